"""What is known of an architecture without loading a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedConfig

from vllm_loopus.modeling.exit_rule import ExitRule


class LoopedConfig(Protocol):
    """What the config of every looped model has, beside what transformers asks of it.

    The names are the same for all: a format with names of its own maps them (transformers'
    `attribute_map`), so that `hf_overrides` and the knobs of requests mean the same everywhere.
    """

    max_loops: int
    min_loops: int
    exit_threshold: float
    base_model_name_or_path: str | None  # whose tokenizer is used if the checkpoint has none

    @property
    def exact_context(self) -> int | None:
        """The longest sequence whose K/V does not depend on its length; None for any."""
        ...

    def check(self) -> None:
        """Raises `ValueError` that names field, value and fix if fields do not fit together."""
        ...

    def get_text_config(self) -> Any:
        """The config that holds the sizes of layers and vocabulary."""
        ...


@dataclass(frozen=True)
class LoopLayers:
    """Which layers of a model run once before the loop, in every pass of it, and once after it."""

    encoder: Sequence[int]
    reasoning: Sequence[int]
    decoder: Sequence[int]
    injects: bool = False  # whether every pass has what the encoder gave as a second input


@dataclass(frozen=True)
class Architecture:
    """One looped architecture. Classes that need torch or vLLM are named as `module:Class` and
    imported when they are used.

    - `name`: as in `architectures` of config.json. `family`: in messages.
    - `config_class`: satisfies `LoopedConfig`.
    - `model`: the vLLM model, which satisfies `serving/model/seam.py`.
    - `reference`: the transformers model that defines the right answers.
    - `exit_rule`, `layers`: by a config.
    """

    name: str
    family: str
    config_class: type[PreTrainedConfig]
    model: str
    reference: str
    exit_rule: Callable[[Any], ExitRule]
    layers: Callable[[Any], LoopLayers]
