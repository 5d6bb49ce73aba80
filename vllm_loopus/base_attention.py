"""Attention of the base model: sliding windows, rotary tables, caps, and unsupported options.

The looped model gives the same answers in transformers and vLLM only if both implement these.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from vllm_loopus.backbones import Backbone

FULL, SLIDING = "full_attention", "sliding_attention"
# Types whose table depends only on the position, and "longrope" (see `exact_context`).
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# Config fields that only transformers or only vLLM implements, and the values that disable them.
NOT_REPRODUCED: dict[str, Any] = {
    "is_causal": True,
    "use_bidirectional_attention": False,
    "dual_chunk_attention_config": None,
    "llama_4_scaling": None,
}


@dataclass(frozen=True)
class BaseAttention:
    """The attention settings in a base config, interpreted as its transformers model does."""

    base: PreTrainedConfig
    backbone: Backbone

    @property
    def types(self) -> list[str]:
        """`full_attention` or `sliding_attention` for each layer of the base model."""
        if self.backbone.windows == "listed":
            return list(self.base.layer_types)
        slides = self.backbone.windows == "all" and self._window is not None
        return [SLIDING if slides else FULL] * self.base.num_hidden_layers

    def window(self, layer: int) -> int | None:
        """How many positions a layer attends to, including its own; None for all."""
        return self._window if self.types[layer] == SLIDING else None

    @property
    def softcap(self) -> float | None:
        """The cap on attention scores; None if there is none."""
        return self.backbone.value(self.base, "attention_softcap")

    @property
    def exact_context(self) -> int | None:
        """The longest sequence whose K/V does not depend on its length; None for no limit.

        LongRoPE changes its frequencies, and so the K/V of all positions, when a sequence exceeds
        the original context.
        """
        lengths = [
            table["original_max_position_embeddings"]
            for table in self._rope_tables()
            if table.get("rope_type") == "longrope"
        ]
        return min(lengths, default=None)

    def check(self) -> None:
        """Raises `ValueError` with field, value and fix for options that are not supported."""
        for name, value in {**NOT_REPRODUCED, **self.backbone.not_reproduced}.items():
            if getattr(self.base, name, value) not in (value, None):
                raise ValueError(
                    f"base_config.{name}={getattr(self.base, name)!r} is not supported; set it to "
                    f"{value!r} if the model does not need it for the served context length"
                )
        self._check_windows()
        for table in self._rope_tables():
            kind = table.get("rope_type", "default")
            if kind not in ROPE_TYPES:
                raise ValueError(
                    f"rope_type={kind!r} of base_config.rope_parameters is not supported; "
                    f"supported: {', '.join(ROPE_TYPES)}"
                )
            share = table.get("partial_rotary_factor", 1.0)
            if share != 1.0 and not self.backbone.partial_rotary:
                raise ValueError(
                    f"partial_rotary_factor={share} of base_config.rope_parameters is not "
                    f"supported for {self.base.model_type} models; remove it"
                )

    def _check_windows(self) -> None:
        window, model_type = self._window, self.base.model_type
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(
                f"base_config.sliding_window={window!r} must be a number of positions, or null for "
                "full attention"
            )
        if window is not None and self.backbone.windows == "none":
            raise ValueError(
                f"base_config.sliding_window={window} has no effect in a {model_type} model; set "
                "it to null"
            )
        types, listed = self.types, getattr(self.base, "layer_types", None)
        if listed is not None and list(listed) != types:
            raise ValueError(
                f"base_config.layer_types={list(listed)} with sliding_window={window} does not "
                f"match the layers of a {model_type} model, {types}; remove layer_types"
            )
        if unknown := set(types) - {FULL, SLIDING}:
            raise ValueError(
                f"base_config.layer_types contains {sorted(unknown)}; only {FULL} and {SLIDING} "
                "are supported"
            )

    @property
    def _window(self) -> int | None:
        window: int | None = getattr(self.base, "sliding_window", None)
        return window

    def _rope_tables(self) -> list[dict[str, Any]]:
        """The rotary parameters of the base model: one set, or one for each layer type."""
        parameters = getattr(self.base, "rope_parameters", None) or {}
        if self.backbone.rotary_by_layer_type:
            return [table for table in parameters.values() if table]
        return [parameters]
