"""`LoopUSForCausalLM` as vLLM runs it, made of vLLM's own layers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import maybe_prefix

from vllm_loopus.backbones import load_class
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.checkpoint import LEGACY_WEIGHTS, current_name
from vllm_loopus.modeling.confidence import ConfidenceHead, head_input
from vllm_loopus.modeling.gate import SelectiveGate
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.model import LoopUSForCausalLM as ReferenceModel
from vllm_loopus.serving.model.base import LoopedModelBase
from vllm_loopus.serving.model.layer_run import FirstLayers, LayerRun
from vllm_loopus.serving.model.loading import load_checked
from vllm_loopus.serving.model.planes import Planes


class Encoder(FirstLayers):
    """`E`: token ids [T] -> `h^0` [T, H]."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config: LoopUSConfig = vllm_config.model_config.hf_config
        super().__init__(vllm_config, config.encoder_layer_indices, prefix)

    def forward(self, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not self.layers:
            return embedded
        hidden, residual = self.run_layers(embedded, positions)
        return hidden + residual


class ReasoningBlock(LayerRun):
    """`R` and `G`: `h^{r-1}` [T, H] -> the update `u^r` and the gated state `h^r`, [T, H] each."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config: LoopUSConfig = vllm_config.model_config.hf_config
        super().__init__(vllm_config, config.reasoning_layer_indices, prefix)
        self.gate = SelectiveGate(config.hidden_size)

    def forward(
        self, state: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # vLLM's fused norms add into the residual in place, and the first residual is the input.
        hidden, residual = self.run_layers(state.clone(), positions)
        update = hidden + residual
        return update, self.gate(update, state)


class Decoder(LayerRun):
    """`D` without the LM head: `h^d` [T, H] -> normed hidden states [T, H].

    Most rows are only computed for their K/V, which the positions after them need. `wanted` [M] are
    the rows whose hidden states are used. The last layer's MLP, the bulk of a layer, only runs on
    these; the outputs of the other rows are meaningless.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config: LoopUSConfig = vllm_config.model_config.hf_config
        super().__init__(vllm_config, config.decoder_layer_indices, prefix)
        norm_class = load_class(config.backbone.vllm_norm)
        self.norm = norm_class(config.hidden_size, eps=config.base.rms_norm_eps)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.lm_head",
        )
        self._wanted: torch.Tensor | None = None  # of the call in progress, for the hooks
        self._num_rows = 0
        if self.layers:
            mlp: Any = self.layers[-1].mlp
            mlp.register_forward_pre_hook(self._select)
            mlp.register_forward_hook(self._spread)

    def forward(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.layers:
            return self.norm(state)
        self._wanted, self._num_rows = wanted, len(state)
        hidden, residual = self.run_layers(state.clone(), positions)
        normed, _ = self.norm(hidden, residual)
        return normed

    def _select(self, mlp: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return args if self._wanted is None else (args[0].index_select(0, self._wanted),)

    def _spread(
        self, mlp: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        if self._wanted is None:
            return output
        rows = output.new_zeros(self._num_rows, output.shape[-1])
        return rows.index_copy_(0, self._wanted, output)


class LoopUSForCausalLM(LoopedModelBase):
    """A LoopUS model for vLLM (`seam.LoopedModel`). Module names are those of the checkpoint."""

    allow_patterns_overrides = ("model*.safetensors", "*.safetensors", LEGACY_WEIGHTS, "*.bin")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        config: LoopUSConfig = self.config
        if self.quant_config is not None:
            self.quant_config.packed_modules_mapping = config.backbone.packed_modules
        self.encoder = Encoder(vllm_config, maybe_prefix(prefix, "encoder"))
        self.reasoning = ReasoningBlock(vllm_config, maybe_prefix(prefix, "reasoning"))
        self.decoder = Decoder(vllm_config, maybe_prefix(prefix, "decoder"))
        self.q_head = ConfidenceHead(config.hidden_size).float()  # it computes in float32
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=config.logit_softcap)
        self.planes = Planes(
            self.encoder,
            self.reasoning,
            self.decoder,
            vllm_config=vllm_config,
            state_size=config.hidden_size,
        )
        self._reads_step_length = HaltingRule.from_config(config).reads_step_length

    @property
    def head(self) -> nn.Module:
        return self.decoder.lm_head

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.encoder.embed(input_ids)

    def encode(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *seed: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (self.encoder(self.embed_input_ids(input_ids), positions),)

    def refine(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        depth: torch.Tensor | None = None,
        injected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`h^{r-1}` -> `h^r`, [T, H], and what the confidence head reads [T, H], or for
        `convergence` the step `h^r - h^{r-1}`."""
        update, refined = self.reasoning(state, positions)
        if self._reads_step_length:
            return refined, refined - state
        return refined, head_input(self.config.confidence_input, update, state, refined)

    def exit_evidence(self, observed: torch.Tensor) -> torch.Tensor:
        """The confidence `q`, or the step length, float32 [S]."""
        if self._reads_step_length:
            return torch.linalg.vector_norm(observed.float(), dim=-1)
        return torch.sigmoid(self.q_head(observed))

    def decode(
        self, state: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.decoder(state, positions, wanted)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads a checkpoint of any format (`load_checked`)."""
        return load_checked(self, weights, ReferenceModel, rename=current_name)
