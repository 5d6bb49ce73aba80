"""`RecursiveForCausalLM` in transformers: the uncached reference model that defines the answers."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from vllm_loopus.architectures.recursive.config import RecursiveConfig
from vllm_loopus.backbones import load_class
from vllm_loopus.modeling.fixed_depth import FixedDepth
from vllm_loopus.modeling.layers import LayerRun, Positions, ScaledEmbedding, capped
from vllm_loopus.modeling.looped_model import Pass
from vllm_loopus.modeling.reference_with_base import ReferenceWithBase


class LoopLinear(nn.Module):
    """A linear layer in one loop: `W x + B_b A_b x + c_b` (arXiv 2410.20672, section 2.3).

    `W` belongs to the tied layer, which all loops share; LoRA and bias are this loop's. They are
    named as in PEFT: `lora_A` [r, in], `lora_B` [out, r].
    """

    def __init__(self, tied: nn.Linear, rank: int, bias: bool) -> None:
        super().__init__()
        self._tied = (tied,)  # a tuple: not a module of this one as well
        outputs, inputs = tied.weight.shape
        self.lora_A = nn.Linear(inputs, rank, bias=False) if rank else None
        self.lora_B = nn.Linear(rank, outputs, bias=False) if rank else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = F.linear(hidden, self._tied[0].weight, self.bias)
        if self.lora_A is not None and self.lora_B is not None:
            output = output + self.lora_B(self.lora_A(hidden))
        return output


class Loop(LayerRun):
    """The layers of the base model as one loop runs them: its norms, biases and LoRA, tied `W`."""

    def __init__(self, config: RecursiveConfig, loop: int, tied: nn.ModuleList) -> None:
        super().__init__(config, (config.layer_of_base(loop, n) for n in range(len(tied))))
        for layer, shared in zip(self.layers, tied, strict=True):
            for name, linear in list(linear_layers(layer)):
                rank = config.rank_of(*linear.weight.shape)
                twin = shared.get_submodule(name)
                assert isinstance(twin, nn.Linear)
                layer.set_submodule(name, LoopLinear(twin, rank, linear.bias is not None))


class Body(nn.Module):
    """What the checkpoint has under `model.`: embedding, tied layers, loops, final norm."""

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__()
        embedding = ScaledEmbedding if config.backbone.scaled_embedding else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(tied_layer(config, n) for n in range(config.block_size))
        self.loops = nn.ModuleList(Loop(config, b, self.layers) for b in range(config.loops))
        norm_class = load_class(config.backbone.hf_norm)
        self.norm = norm_class(config.hidden_size, eps=config.base.rms_norm_eps)


def linear_layers(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a layer of the base model, by name."""
    return ((n, module) for n, module in layer.named_modules() if isinstance(module, nn.Linear))


def tied_layer(config: RecursiveConfig, number: int) -> nn.Module:
    """A layer of the base with nothing but its matrices. It is not called: `LoopLinear` is."""
    layer: nn.Module = load_class(config.backbone.hf_layer)(config.base, number)
    kept = {name for name, _ in linear_layers(layer)}
    for name, module in list(layer.named_modules()):
        if name in kept:
            module.bias = None
        elif name and not list(module.children()) and list(module.parameters()):
            parent, _, last = name.rpartition(".")
            delattr(layer.get_submodule(parent), last)
    return layer


class RecursiveForCausalLM(ReferenceWithBase):
    """`max_loops` loops, each with its own LoRA, norms and biases; then final norm and LM head."""

    config_class = RecursiveConfig
    config: RecursiveConfig
    exit_rule_class = FixedDepth
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LoopLinear):
            if module.bias is not None:
                init.zeros_(module.bias)
            if module.lora_B is not None:
                init.zeros_(module.lora_B.weight)
        else:
            super()._init_weights(module)

    def loop(self, embedded: torch.Tensor, positions: Positions) -> Iterator[Pass]:
        state = embedded
        for depth, loop in enumerate(self.model.loops[: self.config.max_loops], start=1):
            assert isinstance(loop, Loop)
            before, state = state, loop.run_layers(state, positions)
            yield Pass(depth, before, state)

    def exit_values(
        self, loop_pass: Pass, positions: Positions, where: Any
    ) -> dict[str, torch.Tensor]:
        """The `step_length`."""
        return {"step_length": loop_pass.step_length(where)}

    def decode_hidden(self, state: torch.Tensor, positions: Positions) -> torch.Tensor:
        normed: torch.Tensor = self.model.norm(state)
        return normed

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return capped(self.lm_head(hidden), self.config.logit_softcap)
