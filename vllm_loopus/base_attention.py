"""How the layers of a base attend: windows, rotary tables, caps; and what is refused.

Transformers and vLLM must agree on it for the looped model to be the same on both sides.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from vllm_loopus.backbones import Backbone

FULL, SLIDING = "full_attention", "sliding_attention"
# Those whose table is a function of the position alone, but for "longrope": see `exact_context`.
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# Fields that transformers or vLLM acts upon and the other does not, and what switches them off.
NOT_REPRODUCED: dict[str, Any] = {
    "is_causal": True,
    "use_bidirectional_attention": False,
    "dual_chunk_attention_config": None,
    "llama_4_scaling": None,
}


@dataclass(frozen=True)
class BaseAttention:
    """What a base's config says of attention, read as its transformers model reads it."""

    base: PreTrainedConfig
    backbone: Backbone

    @property
    def types(self) -> list[str]:
        """`full_attention` or `sliding_attention`, one a layer of the base."""
        if self.backbone.windows == "listed":
            return list(self.base.layer_types)
        slides = self.backbone.windows == "all" and self._window is not None
        return [SLIDING if slides else FULL] * self.base.num_hidden_layers

    def window(self, layer: int) -> int | None:
        """How many positions a layer of the base attends to, its own included; None for all."""
        return self._window if self.types[layer] == SLIDING else None

    @property
    def softcap(self) -> float | None:
        """The cap on attention scores, None for none."""
        return self.backbone.value(self.base, "attention_softcap")

    @property
    def exact_context(self) -> int | None:
        """The longest sequence whose rotary table does not depend on its length; None for any.

        LongRoPE rotates by other frequencies once a sequence outgrows the original context, K/V
        of all its positions included.
        """
        lengths = [
            table["original_max_position_embeddings"]
            for table in self._rope_tables()
            if table.get("rope_type") == "longrope"
        ]
        return min(lengths, default=None)

    def check(self) -> None:
        """Raises `ValueError` naming field, value and fix for what the two sides do not share."""
        for name, value in {**NOT_REPRODUCED, **self.backbone.not_reproduced}.items():
            if getattr(self.base, name, value) not in (value, None):
                raise ValueError(
                    f"base_config.{name}={getattr(self.base, name)!r} is not supported: set it to "
                    f"{value!r} if the context served does without it"
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
                f"base_config.sliding_window={window} means nothing to a {model_type} model; set "
                "it to null"
            )
        types, listed = self.types, getattr(self.base, "layer_types", None)
        if listed is not None and list(listed) != types:
            raise ValueError(
                f"base_config.layer_types={list(listed)} with sliding_window={window} is not what "
                f"a {model_type} model does; it does {types}: remove layer_types"
            )
        if unknown := set(types) - {FULL, SLIDING}:
            raise ValueError(
                f"base_config.layer_types lists {sorted(unknown)}; only {FULL} and {SLIDING} are "
                "supported"
            )

    @property
    def _window(self) -> int | None:
        window: int | None = getattr(self.base, "sliding_window", None)
        return window

    def _rope_tables(self) -> list[dict[str, Any]]:
        """The base's rotary parameters: one set, or one a layer type."""
        parameters = getattr(self.base, "rope_parameters", None) or {}
        if self.backbone.rotary_by_layer_type:
            return [table for table in parameters.values() if table]
        return [parameters]
