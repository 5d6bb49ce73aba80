"""`LoopUSConfig`: the layout, the recursion budget and the halting rule of a LoopUS model.

It reads two formats, ours (`model_type: "loopus"`) and the released one (`model_type: "lds"`, with
`N`, `q_threshold`, `q_eval_interval` and `base_config_dict`), and always writes ours.
"""

from typing import Any, ClassVar

from transformers import AutoConfig

from vllm_loopus.base_config import ConfigWithBase
from vllm_loopus.loop_fields import check_choice, check_integer

ARCHITECTURE = "LoopUSForCausalLM"
HALTING_STRATEGIES = ("threshold", "cdf", "convergence")
CONFIDENCE_INPUTS = ("state", "update")


class LoopUSConfig(ConfigWithBase):
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
    integers: ClassVar[tuple[str, ...]] = ("max_loops", "min_loops", "exit_interval")
    numbers: ClassVar[tuple[str, ...]] = ("exit_threshold", "convergence_epsilon")
    attribute_map: ClassVar[dict[str, str]] = {
        "N": "max_loops",
        "q_threshold": "exit_threshold",
        "q_eval_interval": "exit_interval",
        "base_config_dict": "base_config",
    }
    halting_strategies = HALTING_STRATEGIES

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
        super().__post_init__(**kwargs)
        self.architectures: list[str] = self.architectures or [ARCHITECTURE]
        # transformers builds a config without arguments to find the defaults; do not check that.
        if self.base_config is not None:
            self.check()

    def check(self) -> None:
        """Raises `ValueError` with field, value and fix if the fields are inconsistent."""
        self.base  # noqa: B018  (raises when missing)
        self._check_layers()
        self.attention.check()
        self.check_loops()
        if self.exit_interval < 1:
            raise ValueError(f"exit_interval={self.exit_interval} must be 1 or more")
        check_choice("confidence_input", self.confidence_input, CONFIDENCE_INPUTS)
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
                check_integer(name, index)
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
