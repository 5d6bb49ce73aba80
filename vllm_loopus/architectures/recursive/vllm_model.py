"""`RecursiveForCausalLM` as vLLM runs it: vLLM's layers, with the weights of a row's own depth."""

import re
from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import maybe_prefix

from vllm_loopus.architectures.recursive.config import RecursiveConfig
from vllm_loopus.architectures.recursive.reference import RecursiveForCausalLM as Reference
from vllm_loopus.backbones import load_class
from vllm_loopus.serving.model.base import LoopedModelBase
from vllm_loopus.serving.model.by_depth import Depths, LinearByDepth, LoRAByDepth, NormByDepth
from vllm_loopus.serving.model.layer_run import FirstLayers
from vllm_loopus.serving.model.loading import load_checked
from vllm_loopus.serving.model.planes import Planes
from vllm_loopus.serving.model.shards import shards_of

# A tensor of one loop: loop, layer, module of the base, and what of it.
OF_A_LOOP = re.compile(
    r"model\.loops\.(\d+)\.(layers\.\d+\..+?)\.(?:(lora_A|lora_B)\.weight|(weight|bias))"
)


class Body(FirstLayers):
    """What the checkpoint has under `model.`: embedding, tied layers, final norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config: RecursiveConfig = vllm_config.model_config.hf_config
        super().__init__(vllm_config, range(config.block_size), prefix)
        norm_class = load_class(config.backbone.vllm_norm)
        self.norm = norm_class(config.hidden_size, eps=config.base.rms_norm_eps)
        self.depths = Depths()
        # By the name in the checkpoint of what they stand for; a matrix is one of its layer's.
        self._norms: dict[str, NormByDepth] = {}
        self._matrices: dict[str, tuple[LoRAByDepth, int]] = {}
        for name, module in list(self.layers.named_modules(prefix="layers")):
            if isinstance(module, norm_class):
                self._norms[name] = norm = NormByDepth(module, config.max_loops, self.depths)
                self.set_submodule(name, norm)
            elif isinstance(module, LinearBase):
                self._give_lora(name, module, config)

    def forward(
        self, state: torch.Tensor, positions: torch.Tensor, depth: torch.Tensor
    ) -> torch.Tensor:
        """One pass of rows at depths [T]: `h^{r-1}` [T, H] -> `h^r` [T, H]."""
        self.depths.select(depth)
        # vLLM's fused norms add into the residual in place, and the first residual is the input.
        hidden, residual = self.run_layers(state.clone(), positions)
        return hidden + residual

    def _give_lora(self, name: str, linear: LinearBase, config: RecursiveConfig) -> None:
        parent, _, last = name.rpartition(".")
        matrices = config.backbone.packed_modules.get(last, [last])
        shards = shards_of(linear, len(matrices))
        ranks = [config.rank_of(*shard.whole) for shard in shards]
        added = LoRAByDepth(linear, shards, ranks, config.max_loops, self.depths)
        linear.by_depth = added
        linear.quant_method = LinearByDepth(linear.quant_method, added)
        for number, matrix in enumerate(matrices):
            self._matrices[f"{parent}.{matrix}"] = (added, number)

    def load(self, loop: int, name: str, kind: str, tensor: torch.Tensor) -> None:
        """Sets a tensor of one loop: `kind` is `weight` of a norm, or `lora_A`, `lora_B` or `bias`
        of a matrix."""
        if name in self._norms:
            self._norms[name].load(loop, tensor)
        else:
            added, number = self._matrices[name]
            added.load(loop, number, kind, tensor)


class RecursiveForCausalLM(LoopedModelBase):
    """A relaxed recursive transformer for vLLM (`seam.LoopedModel`)."""

    reads_depth = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        config: RecursiveConfig = self.config
        if self.quant_config is not None:
            self.quant_config.packed_modules_mapping = config.backbone.packed_modules
        self.model = Body(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=config.logit_softcap)
        nothing = nn.Module()
        self.planes = Planes(
            nothing,
            self.model.layers,
            nothing,
            vllm_config=vllm_config,
            state_size=config.hidden_size,
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed(input_ids)

    def refine(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        depth: torch.Tensor | None = None,
        injected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`h^{r-1}` -> `h^r`, [T, H], which is also what is looked at: there is no exit rule."""
        assert depth is not None
        refined = self.model(state, positions, depth)
        return refined, refined

    def exit_evidence(self, observed: torch.Tensor) -> torch.Tensor:
        return observed.new_zeros(len(observed), dtype=torch.float32)

    def decode(
        self, state: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        normed: torch.Tensor = self.model.norm(state)
        return normed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As `load_checked`."""
        loaded = load_checked(self, weights, Reference, takes=self._take)
        of_loops = (NormByDepth, LoRAByDepth)
        return loaded | {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, of_loops)
            for parameter, _ in module.named_parameters()
        }

    def _take(self, name: str, tensor: torch.Tensor) -> bool:
        """Loads a tensor of one loop, if that loop is served."""
        match = OF_A_LOOP.fullmatch(name)
        if match is not None and int(match[1]) < self.max_loops:
            self.model.load(int(match[1]), match[2], match[3] or match[4], tensor)
        return match is not None
