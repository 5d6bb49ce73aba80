"""Encoder, reasoning block and decoder, built from the base model's transformers layers."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from vllm_loopus.backbones import load_class
from vllm_loopus.base_attention import SLIDING
from vllm_loopus.base_config import ConfigWithBase
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.gate import SelectiveGate
from vllm_loopus.modeling.looped_model import position_ids_of


@dataclass(frozen=True)
class Positions:
    """Position inputs of the layers: ids, and a rotary table and mask for each layer type."""

    position_ids: torch.Tensor  # [B, T]
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]]  # cos, sin [B, T, head_dim]
    masks: dict[str, torch.Tensor | None]

    @classmethod
    def build(
        cls,
        config: ConfigWithBase,
        rotary_embedding: nn.Module,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> "Positions":
        """Builds them for hidden states [B, T, H] and an optional mask [B, T] of valid tokens."""
        if position_ids is None:
            position_ids = position_ids_of(hidden, attention_mask)
        base = config.base
        windowed = getattr(base, "sliding_window", None) is not None
        rotary, masks = {}, {}
        for kind in set(config.attention.types):
            create = (
                create_sliding_window_causal_mask
                if kind == SLIDING and windowed
                else create_causal_mask
            )
            masks[kind] = create(
                config=base,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=None,
                position_ids=position_ids,
            )
            by_type = [kind] if config.backbone.rotary_by_layer_type else []
            rotary[kind] = rotary_embedding(hidden, position_ids, *by_type)
        return cls(position_ids, rotary, masks)


class ScaledEmbedding(nn.Embedding):
    """Embeddings multiplied by sqrt(H). As in Gemma, the factor is rounded to their dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype)
        return super().forward(input) * scale


class LayerRun(nn.Module):
    """Consecutive layers of the base model; the base class of parts of models."""

    def __init__(self, config: ConfigWithBase, indices: Iterable[int]) -> None:
        super().__init__()
        layer_class = load_class(config.backbone.hf_layer)
        indices = list(indices)
        self.layers = nn.ModuleList(layer_class(config.base, index) for index in indices)
        self.attention_types = [config.attention.types[index] for index in indices]

    def run_layers(self, hidden: torch.Tensor, positions: Positions) -> torch.Tensor:
        for layer, kind in zip(self.layers, self.attention_types, strict=True):
            hidden = layer(
                hidden,
                attention_mask=positions.masks[kind],
                position_ids=positions.position_ids,
                position_embeddings=positions.rotary[kind],
            )
        return hidden


class Encoder(LayerRun):
    """`E`: the embedding and the first layers of the base model."""

    def __init__(self, config: LoopUSConfig) -> None:
        super().__init__(config, config.encoder_layer_indices)
        embedding = ScaledEmbedding if config.backbone.scaled_embedding else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)


class ReasoningBlock(LayerRun):
    """`R` and its gate `G`: one pass maps the state at depth r-1 to the state at depth r."""

    def __init__(self, config: LoopUSConfig) -> None:
        super().__init__(config, config.reasoning_layer_indices)
        self.gate = SelectiveGate(config.hidden_size)


class Decoder(LayerRun):
    """`D`: the last layers of the base model, its final norm and an untied LM head."""

    def __init__(self, config: LoopUSConfig) -> None:
        super().__init__(config, config.decoder_layer_indices)
        norm_class = load_class(config.backbone.hf_norm)
        self.norm = norm_class(config.hidden_size, eps=config.base.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.logit_softcap = config.logit_softcap

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [..., H] -> logits [..., V]."""
        return capped(self.lm_head(hidden), self.logit_softcap)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits between `-cap` and `cap`, if there is a cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
