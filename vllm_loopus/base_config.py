"""Configs of models that are made from a pretrained one and contain its config.

`ConfigWithBase` is the common base class: `LoopUSConfig` and the recursive transformers.
"""

import copy
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from vllm_loopus.backbones import BACKBONES, Backbone
from vllm_loopus.base_attention import BaseAttention
from vllm_loopus.loop_fields import LoopFields

MISSING_BASE = (
    "base_config is missing; give the base model's complete config (`base_config_dict` in the "
    "released format)"
)


class ConfigWithBase(LoopFields, PreTrainedConfig):
    """A config with that of the base model as a part.

    - `base_config`: the complete config of the base model, a dict or a config.
    - `base_model_name_or_path`: the origin of the base model; its tokenizer is used if the
      checkpoint has none.
    """

    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    base_config: dict[str, Any] | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for derived in ("hidden_size", "vocab_size"):
            kwargs.pop(derived, None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers. Raises `ValueError` if the checkpoint has no base config."""
        if not any(config_dict.get(name) for name in ("base_config", "base_config_dict")):
            raise ValueError(MISSING_BASE)
        return super().from_dict(config_dict, **kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        name = self.attribute_map.get(key, key)
        if name == "base_config" and isinstance(value, dict):
            value = _base_config_from_dict(value)
        elif name == "base_config" and getattr(value, "tie_word_embeddings", False):
            value = copy.deepcopy(value)
            value.tie_word_embeddings = False  # see `_base_config_from_dict`
        super().__setattr__(name, value)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base model's config, which contains the sizes that vLLM and transformers read."""
        return self if self.base_config is None else self.base

    @property
    def base(self) -> PreTrainedConfig:
        """`base_config` as a config. Raises `ValueError` if it is missing."""
        if not isinstance(self.base_config, PreTrainedConfig):
            raise ValueError(MISSING_BASE)
        return self.base_config

    @property
    def backbone(self) -> Backbone:
        """The entry of `BACKBONES` for the base model. Raises `ValueError` if there is none."""
        return _backbone_of(self.base.model_type)

    @property
    def attention(self) -> BaseAttention:
        """The attention settings of the base model."""
        return BaseAttention(self.base, self.backbone)

    @property
    def exact_context(self) -> int | None:
        """The longest sequence whose K/V does not depend on its length; None for no limit."""
        return self.attention.exact_context

    @property
    def logit_softcap(self) -> float | None:
        """The cap on logits of the base model; None if there is none."""
        return self.backbone.value(self.base, "logit_softcap")

    @property
    def hidden_size(self) -> int:
        return int(self.get_text_config().hidden_size) if self.base_config is not None else 0

    @property
    def vocab_size(self) -> int:
        return int(self.get_text_config().vocab_size) if self.base_config is not None else 0


def _base_config_from_dict(value: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(value)
    model_type = fields.pop("model_type", None)
    _backbone_of(model_type)
    for about_the_file in ("transformers_version", "_name_or_path"):
        fields.pop(about_the_file, None)
    # Whether the LM head is tied is said by the looped model's config, not by that of its base.
    fields["tie_word_embeddings"] = False
    try:
        return CONFIG_MAPPING[model_type](**fields)
    except StrictDataclassError as error:
        raise ValueError(f"base_config is not a valid {model_type} config: {error}") from error


def _backbone_of(model_type: Any) -> Backbone:
    if model_type not in BACKBONES:
        raise ValueError(
            f"base_config.model_type={model_type!r} is not supported; "
            f"supported base models: {', '.join(BACKBONES)}"
        )
    return BACKBONES[model_type]
