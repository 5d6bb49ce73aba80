"""`OuroForCausalLM` as vLLM runs it, made of vLLM's own Llama layers."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.utils import maybe_prefix

from vllm_loopus.architectures.ouro.config import OuroConfig
from vllm_loopus.architectures.ouro.reference import OuroForCausalLM as ReferenceModel
from vllm_loopus.serving.model.base import LoopedModelBase
from vllm_loopus.serving.model.loading import load_checked
from vllm_loopus.serving.model.padded_heads import pad_heads
from vllm_loopus.serving.model.planes import Planes


class OuroLayer(LlamaDecoderLayer):
    """A Llama layer whose attention and MLP are normed before and after."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        config: OuroConfig = vllm_config.model_config.hf_config
        self.input_layernorm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        pad_heads(self.self_attn, vllm_config)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, H] -> [T, H]."""
        attended = self.self_attn(positions, self.input_layernorm(hidden))
        hidden = hidden + self.input_layernorm_2(attended)
        refined = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + self.post_attention_layernorm_2(refined)


class Body(nn.Module):
    """What the checkpoint has under `model.`"""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: OuroConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            OuroLayer(vllm_config, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1).float()  # it computes in float32


class OuroForCausalLM(LoopedModelBase):
    """An Ouro model for vLLM (`seam.LoopedModel`). Module names are those of the checkpoint."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        config: OuroConfig = self.config
        self.model = Body(vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.planes = self.build_planes(vllm_config)

    def build_planes(self, vllm_config: VllmConfig) -> Planes:
        """Nothing has K/V before the loop and after it."""
        nothing, size = nn.Module(), self.config.hidden_size
        return Planes(nothing, self.model.layers, nothing, vllm_config, state_size=size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def refine(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        depth: torch.Tensor | None = None,
        injected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`h^{t-1}` -> `h^t`, [T, H], which the gate looks at as well."""
        for layer in self.model.layers:
            state = layer(state, positions)
        refined = self.model.norm(state)
        return refined, refined

    def exit_evidence(self, observed: torch.Tensor) -> torch.Tensor:
        """`lambda_t`, float32 [S]."""
        return torch.sigmoid(self.model.early_exit_gate(observed.float()).squeeze(-1))

    def decode(
        self, state: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        return state

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a checkpoint (`load_checked`)."""
        return load_checked(self, weights, ReferenceModel)
