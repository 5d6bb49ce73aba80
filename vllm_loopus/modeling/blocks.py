"""Encoder, reasoning block and decoder from the base model's own transformers layers."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from vllm_loopus.backbones import load_class
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.gate import SelectiveGate


@dataclass(frozen=True)
class Positions:
    """What every layer needs to know of positions: rotary tables, mask and ids."""

    position_ids: torch.Tensor  # [B, T]
    rotary: tuple[torch.Tensor, torch.Tensor]  # cos, sin [B, T, head_dim]
    causal_mask: torch.Tensor | None

    @classmethod
    def build(
        cls,
        config: LoopUSConfig,
        rotary_embedding: nn.Module,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> "Positions":
        """For hidden states [B, T, H] and an optional mask [B, T] of valid tokens."""
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            else:
                position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = create_causal_mask(
            config=config.base,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        return cls(position_ids, rotary_embedding(hidden, position_ids), mask)


class LayerRun(nn.Module):
    """A run of the base model's layers; the base class of all three blocks."""

    def __init__(self, config: LoopUSConfig, indices: Iterable[int]) -> None:
        super().__init__()
        layer_class = load_class(config.backbone.hf_layer)
        self.layers = nn.ModuleList(layer_class(config.base, index) for index in indices)

    def run_layers(self, hidden: torch.Tensor, positions: Positions) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=positions.causal_mask,
                position_ids=positions.position_ids,
                position_embeddings=positions.rotary,
            )
        return hidden


class Encoder(LayerRun):
    """`E`: embedding and the first layers of the base."""

    def __init__(self, config: LoopUSConfig) -> None:
        super().__init__(config, config.encoder_layer_indices)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)


class ReasoningBlock(LayerRun):
    """`R` and its gate `G`: one pass takes the state at depth r-1 to depth r."""

    def __init__(self, config: LoopUSConfig) -> None:
        super().__init__(config, config.reasoning_layer_indices)
        self.gate = SelectiveGate(config.hidden_size)


class Decoder(LayerRun):
    """`D`: the last layers of the base, its final norm and the LM head (never tied)."""

    def __init__(self, config: LoopUSConfig) -> None:
        super().__init__(config, config.decoder_layer_indices)
        norm_class = load_class(config.backbone.hf_norm)
        self.norm = norm_class(config.hidden_size, eps=config.base.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
