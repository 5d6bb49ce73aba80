"""A second looped architecture, for the tests: all that a new one has to bring, in one module.

It is shaped like Ouro (arXiv 2510.25741), and gives the answers of Ouro's own code with its
weights: no encoder or decoder layers, sandwich norms, the final norm inside the loop, a plain
linear gate, an exit rule that accumulates hazards. Two options that Ouro lacks use the rest of the
seam: `injects` (the embedding goes into every pass again) and `reads_depth` (each pass adds a
vector of its depth).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader

from vllm_loopus.architectures import Architecture, LoopLayers
from vllm_loopus.loop_fields import LoopFields
from vllm_loopus.modeling.exit_rule import ExitRule
from vllm_loopus.serving.model.base import LoopedModelBase
from vllm_loopus.serving.model.planes import Planes

NAME = "SecondLoopForCausalLM"
HEAD, PADDED_HEAD = 16, 32  # vLLM's CPU attention has no heads of 16: they are padded with zeros


class SecondConfig(LoopFields, PreTrainedConfig):
    """Ouro's names for loops and threshold are mapped to ours."""

    model_type: ClassVar[str] = "second_loop"
    attribute_map: ClassVar[dict[str, str]] = {
        "total_ut_steps": "max_loops",
        "early_exit_threshold": "exit_threshold",
    }
    vocab_size: int = 320
    hidden_size: int = 64
    intermediate_size: int = 160
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = PADDED_HEAD
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_parameters: dict[str, Any] | None = None
    max_loops: int = 4
    min_loops: int = 1
    exit_threshold: int | float = 1.0
    halting_strategy: str = "cdf"
    injects: bool = False
    reads_depth: bool = False
    base_model_name_or_path: str | None = None

    halting_strategies: ClassVar[tuple[str, ...]] = ("cdf",)

    def check(self) -> None:
        self.check_loops()


@dataclass(frozen=True)
class HazardRule(ExitRule):
    """Exits at the first depth at which the accumulated probability of having exited reaches the
    threshold. Carries what is left of it."""

    values: ClassVar[tuple[str, ...]] = ("confidence",)

    @classmethod
    def from_config(cls, config: SecondConfig) -> "HazardRule":
        return cls("cdf", config.exit_threshold, config.min_loops, config.max_loops)

    @property
    def first_carry(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def comparison(self) -> Literal[">", ">=", "<"]:
        return ">="

    def evidence(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["confidence"]

    def compared(
        self, depth: Any, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        left = carry[:, 0] * (1 - evidence)
        return 1 - left, left[:, None]

    def predetermined(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        if depth >= max_loops:
            return True
        return False if exit_threshold > 1 or min_loops >= max_loops else None

    def __str__(self) -> str:
        return f"hazards accumulated to {self.exit_threshold}"


class SecondLayer(nn.Module):
    """A layer of vLLM's parts, with norms around attention and MLP."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LlamaAttention(
            config,
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.max_position_embeddings,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = LlamaMLP(size, config.intermediate_size, "silu", prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(size, eps)
        self.input_layernorm_2 = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm_2 = RMSNorm(size, eps)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        attended = self.self_attn(positions, self.input_layernorm(hidden))
        hidden = hidden + self.input_layernorm_2(attended)
        refined = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + self.post_attention_layernorm_2(refined)


class Body(nn.Module):
    """What the checkpoint has under `model.`"""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        size = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, size)
        self.layers = nn.ModuleList(
            SecondLayer(vllm_config, f"model.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(size, 1)
        if config.injects:
            self.adapter = nn.Linear(2 * size, size, bias=False)
        if config.reads_depth:
            self.of_depth = nn.Embedding(config.max_loops + 1, size)


class SecondLoopForCausalLM(LoopedModelBase):
    """`seam.LoopedModel` in about forty lines."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.max_loops, self.reads_depth = config.max_loops, config.reads_depth
        self.model = Body(vllm_config)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        nothing = nn.Module()
        self.planes = Planes(
            nothing,
            self.model.layers,
            nothing,
            vllm_config=vllm_config,
            state_size=config.hidden_size,
            injected_size=config.hidden_size if config.injects else 0,
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def encode(self, input_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embedded = self.embed_input_ids(input_ids)
        return (embedded, embedded.clone()) if self.config.injects else (embedded,)

    def refine(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        depth: torch.Tensor | None = None,
        injected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if injected is not None:
            state = self.model.adapter(torch.cat([state, injected], dim=-1))
        if depth is not None:
            state = state + self.model.of_depth(depth)
        for layer in self.model.layers:
            state = layer(state, positions)
        refined = self.model.norm(state)
        return refined, refined

    def exit_evidence(self, observed: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.model.early_exit_gate(observed).squeeze(-1).float())

    def decode(
        self, state: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        return state

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        padded = ((name, with_padded_heads(name, tensor)) for name, tensor in weights)
        return AutoWeightsLoader(self).load_weights(padded, mapper=LlamaModel.hf_to_vllm_mapper)


def with_padded_heads(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Projections of heads of 16 as those of heads of 32. Rotation is of the first 16 channels;
    scores are scaled by 32 instead of 16, which the queries make up for."""
    if "self_attn" not in name:
        return tensor
    if "o_proj" in name:
        heads = tensor.unflatten(1, (-1, HEAD))
        return nn.functional.pad(heads, (0, PADDED_HEAD - HEAD)).flatten(1)
    heads = nn.functional.pad(tensor.unflatten(0, (-1, HEAD)), (0, 0, 0, PADDED_HEAD - HEAD))
    return heads.flatten(0, 1) * ((PADDED_HEAD / HEAD) ** 0.5 if "q_proj" in name else 1)


def _layers(config: SecondConfig) -> LoopLayers:
    return LoopLayers((), range(config.num_hidden_layers), (), injects=config.injects)


RECORD = Architecture(
    name=NAME,
    family="Second",
    config_class=SecondConfig,
    model=f"{__name__}:{NAME}",
    reference=None,
    exit_rule=HazardRule,
    layers=_layers,
)


def write_checkpoint(weights: Path, folder: Path, **fields: Any) -> Path:
    """A checkpoint of the architecture with Ouro's `weights`, and random ones for what it lacks."""
    AutoConfig.register(SecondConfig.model_type, SecondConfig, exist_ok=True)
    tensors = load_file(weights)
    torch.manual_seed(3)
    size = SecondConfig.hidden_size
    if fields.get("injects"):
        tensors["model.adapter.weight"] = torch.randn(size, 2 * size) / size**0.5
    if fields.get("reads_depth"):
        loops = fields.get("max_loops", SecondConfig.max_loops)
        tensors["model.of_depth.weight"] = torch.randn(loops + 1, size)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    share = HEAD / PADDED_HEAD
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": share}
    config = {
        "model_type": SecondConfig.model_type, "architectures": [NAME], "rope_parameters": rope,
        "tie_word_embeddings": False, **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Reference:
    """The architecture in plain torch, uncached; it defines the answers of the two options."""

    def __init__(self, folder: Path) -> None:
        self.config = SecondConfig.from_pretrained(folder)
        self.weights = load_file(folder / "model.safetensors")

    def __call__(self, tokens: list[int], max_loops: int, threshold: float) -> tuple[int, int]:
        """The next token, and the depth at which the last position exits."""
        weights = self.weights
        embedded = state = weights["model.embed_tokens.weight"][tokens]
        left = 1.0
        for depth in range(1, max_loops + 1):
            if self.config.injects:
                both = torch.cat([state, embedded], dim=-1)
                state = both @ weights["model.adapter.weight"].T
            if self.config.reads_depth:
                state = state + weights["model.of_depth.weight"][depth]
            for layer in range(self.config.num_hidden_layers):
                state = self._layer(f"model.layers.{layer}.", state)
            state = self._norm("model.norm", state)
            gate = "model.early_exit_gate."
            hazard = torch.sigmoid(state[-1] @ weights[gate + "weight"][0] + weights[gate + "bias"])
            left *= 1 - hazard.item()
            if 1 - left >= threshold:
                break
        return int((weights["lm_head.weight"] @ state[-1]).argmax()), depth

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.weights[name + ".weight"]

    def _layer(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        attended = self._attention(name, self._norm(name + "input_layernorm", hidden))
        hidden = hidden + self._norm(name + "input_layernorm_2", attended)
        x = self._norm(name + "post_attention_layernorm", hidden)
        names = (f"{name}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        gate, up, down = (self.weights[name] for name in names)
        refined = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        return hidden + self._norm(name + "post_attention_layernorm_2", refined)

    def _attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            (x @ self.weights[f"{name}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, HEAD))
            for n in "qkv"
        )
        q, k, v = (self._rotated(q), self._rotated(k), v)
        attended = nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in (q, k, v)), is_causal=True
        )
        joined = attended[0].transpose(0, 1).flatten(1)
        return joined @ self.weights[f"{name}self_attn.o_proj.weight"].T

    @staticmethod
    def _rotated(x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(len(x)), 1e6 ** (-torch.arange(0, HEAD, 2) / HEAD))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
