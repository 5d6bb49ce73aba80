"""`OuroForCausalLM` in transformers: the uncached reference model that defines the answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from vllm_loopus.architectures.ouro.config import OuroConfig
from vllm_loopus.architectures.ouro.exit_rule import CumulativeRule
from vllm_loopus.modeling.looped_model import (
    LoopedOutput,
    LoopedReference,
    Pass,
    kept,
    loss_of,
    position_ids_of,
)


@dataclass(frozen=True)
class Positions:
    """Position inputs of the layers: ids [B, T], rotary tables [B, T, head_dim] and the mask."""

    position_ids: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor | None


class OuroLayer(LlamaDecoderLayer):
    """A Llama layer whose attention and MLP are normed before and after."""

    def __init__(self, config: OuroConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.input_layernorm_2 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm_2 = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, positions: Positions) -> torch.Tensor:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden),
            attention_mask=positions.mask,
            position_ids=positions.position_ids,
            position_embeddings=positions.rotary,
        )
        hidden = hidden + self.input_layernorm_2(attended)
        refined = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + self.post_attention_layernorm_2(refined)


class Body(nn.Module):
    """What the checkpoint has under `model.`"""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OuroLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)


class OuroForCausalLM(LoopedReference):
    """An Ouro model: `h^t = norm(layers(h^{t-1}))`, `h^0` the embedding, logits `lm_head(h^d)`.

    Attention of loop t sees the K/V of loop t only, so that a position's exit changes nothing for
    others.
    """

    config_class = OuroConfig
    config: OuroConfig
    exit_rule_class = CumulativeRule
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OuroConfig) -> None:
        config.check()
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def positions(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Positions:
        if position_ids is None:
            position_ids = position_ids_of(hidden, attention_mask)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        return Positions(position_ids, self.rotary_emb(hidden, position_ids), mask)

    def loop(self, embedded: torch.Tensor, positions: Positions) -> Iterator[Pass]:
        state = embedded
        for depth in range(1, self.config.max_loops + 1):
            refined = state
            for layer in self.model.layers:
                refined = layer(refined, positions)
            refined = self.model.norm(refined)
            yield Pass(depth, state, refined)
            state = refined

    def exit_values(
        self, loop_pass: Pass, positions: Positions, where: Any
    ) -> dict[str, torch.Tensor]:
        """The `confidence` `lambda_t`, and the `step_length`."""
        return {
            "confidence": self.exit_probability(loop_pass.state[where]),
            "step_length": loop_pass.step_length(where),
        }

    def exit_probability(self, state: torch.Tensor) -> torch.Tensor:
        """`lambda_t` [...] of states [..., H], in float32."""
        gate = self.model.early_exit_gate
        scores = nn.functional.linear(state.float(), gate.weight.float(), gate.bias.float())
        return torch.sigmoid(scores.squeeze(-1))

    def decode_hidden(self, state: torch.Tensor, positions: Positions) -> torch.Tensor:
        return state

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_states: bool = False,
        use_weighted_exit: bool | None = None,
        **_: Any,
    ) -> LoopedOutput:
        """As in `LoopedReference`. `use_weighted_exit`: by default that of the config; weighted
        logits have no exit depth and no states. A fixed `early_exit_step` comes first."""
        weighted = self.config.use_weighted_exit if use_weighted_exit is None else use_weighted_exit
        if not weighted or self.config.early_exit_step is not None:
            return super().forward(
                input_ids, attention_mask, position_ids, inputs_embeds, labels, logits_to_keep,
                output_states,
            )  # fmt: skip
        embedded = self.embedded(input_ids, inputs_embeds)
        positions = self.positions(embedded, attention_mask, position_ids)
        logits = self._weighted_logits(embedded, positions, logits_to_keep)
        return LoopedOutput(loss=loss_of(logits, labels), logits=logits)

    def _weighted_logits(
        self, embedded: torch.Tensor, positions: Positions, logits_to_keep: int | torch.Tensor
    ) -> torch.Tensor:
        """The mean [B, T', V] over all loops; the last one has the share that is left."""
        left: Any = 1.0
        logits: Any = 0.0
        for loop_pass in self.loop(embedded, positions):
            state = loop_pass.state[:, kept(logits_to_keep)]
            last = loop_pass.depth == self.config.max_loops
            share = left * (1.0 if last else self.exit_probability(state)[..., None])
            left = left - share
            logits = logits + share * self.head(state)
        weighted: torch.Tensor = logits
        return weighted

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_weighted_exit: bool | None = None,
        **rest: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask, **rest)
        return {**inputs, "use_weighted_exit": use_weighted_exit}
