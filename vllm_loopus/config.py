"""`LoopUSConfig`: the layout, the recursion budget and the halting rule of a LoopUS model.

It reads two formats, ours (`model_type: "loopus"`) and the released one (`model_type: "lds"`, with
`N`, `q_threshold`, `q_eval_interval` and `base_config_dict`), and always writes ours.
"""

import copy
import math
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from vllm_loopus.backbones import BACKBONES, Backbone
from vllm_loopus.base_attention import BaseAttention

ARCHITECTURE = "LoopUSForCausalLM"
HALTING_STRATEGIES = ("threshold", "cdf", "convergence")
CONFIDENCE_INPUTS = ("state", "update")
MISSING_BASE = (
    "base_config is missing; give the base model's complete config (`base_config_dict` in the "
    "released format)"
)
MAX_RECURSION_DEPTH = 256  # a larger value is certainly a mistake


class LoopUSConfig(PreTrainedConfig):
    """A base model split into encoder, reasoning block and decoder.

    Fields (names of the released format in brackets; both are accepted everywhere, including in
    `hf_overrides`):

    - `base_config` [`base_config_dict`]: the complete config of the base model, a dict or a config.
    - `base_model_name_or_path`: the origin of the base model; its tokenizer is used if the
      checkpoint has none.
    - `encoder_layer_indices`, `reasoning_layer_indices`, `decoder_layer_indices`: layers of the
      base model (0-based), ascending and in this order. Encoder and decoder may be empty.
    - `max_loops` [`N`]: the recursion budget. `min_loops`: the minimum exit depth of a token.
    - `halting_strategy`: `threshold`, `cdf` or `convergence`, with `exit_threshold`
      [`q_threshold`] (1.0 or more: no early exit), `exit_interval` [`q_eval_interval`] and
      `convergence_epsilon`.
    - `confidence_input`: what the confidence head reads, the gated `state` or the `update`.

    Raises `ValueError` with field, value and fix when it is built, or when `check()` is called
    after fields were overridden.
    """

    model_type: ClassVar[str] = "loopus"
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}
    attribute_map: ClassVar[dict[str, str]] = {
        "N": "max_loops",
        "q_threshold": "exit_threshold",
        "q_eval_interval": "exit_interval",
        "base_config_dict": "base_config",
    }

    base_config: dict[str, Any] | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    encoder_layer_indices: list[int] | tuple[int, ...] = ()
    reasoning_layer_indices: list[int] | tuple[int, ...] = ()
    decoder_layer_indices: list[int] | tuple[int, ...] = ()
    max_loops: int = 8
    min_loops: int = 1
    halting_strategy: str = "threshold"
    exit_threshold: int | float = 0.6
    exit_interval: int = 1
    convergence_epsilon: int | float = 0.01
    confidence_input: str = "state"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for released_name, name in self.attribute_map.items():
            if released_name in kwargs:
                setattr(self, name, kwargs.pop(released_name))
        for derived in ("hidden_size", "vocab_size"):
            kwargs.pop(derived, None)
        super().__post_init__(**kwargs)
        self.architectures: list[str] = self.architectures or [ARCHITECTURE]
        # transformers builds a config without arguments to find the defaults; do not check that.
        if self.base_config is not None:
            self.check()

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
        if name in _INTEGERS:
            _check_integer(name, value)
        elif name in _NUMBERS:
            _check_number(name, value)
        try:
            super().__setattr__(key, value)
        except StrictDataclassError as error:
            raise ValueError(f"{name}={value!r} does not have the right type: {error}") from error

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

    def check(self) -> None:
        """Raises `ValueError` with field, value and fix if the fields are inconsistent."""
        self.base  # noqa: B018  (raises when missing)
        self._check_layers()
        self.attention.check()
        if not 1 <= self.max_loops <= MAX_RECURSION_DEPTH:
            raise ValueError(
                f"max_loops={self.max_loops} must be from 1 to {MAX_RECURSION_DEPTH}; "
                "it is the recursion budget (the paper's N, 8 in the published models)"
            )
        if not 1 <= self.min_loops <= self.max_loops:
            raise ValueError(
                f"min_loops={self.min_loops} must be from 1 to max_loops={self.max_loops}; "
                "lower min_loops or raise max_loops"
            )
        if self.exit_interval < 1:
            raise ValueError(f"exit_interval={self.exit_interval} must be 1 or more")
        _check_choice("halting_strategy", self.halting_strategy, HALTING_STRATEGIES)
        _check_choice("confidence_input", self.confidence_input, CONFIDENCE_INPUTS)
        if self.exit_threshold < 0:
            raise ValueError(
                f"exit_threshold={self.exit_threshold} must be 0 or more (1.0 or more: no early "
                "exit)"
            )
        if self.convergence_epsilon < 0:
            raise ValueError(f"convergence_epsilon={self.convergence_epsilon} must be 0 or more")
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=True is not supported, because encoder and decoder have "
                "separate matrices; set it to False"
            )

    def _check_layers(self) -> None:
        num_layers = self.base.num_hidden_layers
        runs = {
            "encoder_layer_indices": self.encoder_layer_indices,
            "reasoning_layer_indices": self.reasoning_layer_indices,
            "decoder_layer_indices": self.decoder_layer_indices,
        }
        for name, run in runs.items():
            for index in run:
                _check_integer(name, index)
                if not 0 <= index < num_layers:
                    raise ValueError(
                        f"{name}={list(run)} contains layer {index}, but the base model has layers "
                        f"0..{num_layers - 1}; correct the list"
                    )
        if not self.reasoning_layer_indices:
            raise ValueError(
                "reasoning_layer_indices=[] is empty; a LoopUS model needs at least one layer to "
                "loop, so move one from encoder_layer_indices or decoder_layer_indices"
            )
        owner: dict[int, str] = {}
        previous = -1
        for name, run in runs.items():
            for index in run:
                if index in owner:
                    raise ValueError(
                        f"layer {index} is in both {owner[index]} and {name}={list(run)}; "
                        "remove it from one of them"
                    )
                owner[index] = name
                if index < previous:
                    raise ValueError(
                        f"{name}={list(run)} is out of order after layer {previous}; the layers of "
                        "encoder, reasoning and decoder must be ascending, in this order"
                    )
                previous = index


class ReleasedLoopUSConfig(LoopUSConfig):
    """Reads a released checkpoint (`model_type: "lds"`) into a `LoopUSConfig`."""

    model_type: ClassVar[str] = "lds"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return LoopUSConfig.from_dict({**config_dict, "model_type": "loopus"}, **kwargs)


def register_released_format() -> None:
    """Registers the released checkpoints' format with `AutoConfig`. May be called repeatedly."""
    AutoConfig.register(ReleasedLoopUSConfig.model_type, ReleasedLoopUSConfig, exist_ok=True)


_INTEGERS = ("max_loops", "min_loops", "exit_interval")
_NUMBERS = ("exit_threshold", "convergence_epsilon")


def _base_config_from_dict(value: dict[str, Any]) -> PreTrainedConfig:
    fields = dict(value)
    model_type = fields.pop("model_type", None)
    _backbone_of(model_type)
    for about_the_file in ("transformers_version", "_name_or_path"):
        fields.pop(about_the_file, None)
    # The LM head of a LoopUS model is never tied, even if that of the base model is.
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


def is_integer(value: object) -> bool:
    """Whether `value` is a whole number; `True` and `False` are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """Whether `value` is a number in the range of floats and neither NaN nor infinite."""
    try:
        return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
    except OverflowError:  # an integer outside the range of floats
        return False


def _check_integer(name: str, value: object) -> None:
    if not is_integer(value):
        raise ValueError(f"{name}={value!r} must be a whole number")


def _check_number(name: str, value: object) -> None:
    if not is_finite_number(value):
        raise ValueError(f"{name}={value!r} must be a finite number")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
