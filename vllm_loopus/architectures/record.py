"""The record of an architecture: what the engine needs to know before it loads a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from transformers import PreTrainedConfig

from vllm_loopus.modeling.exit_rule import ExitRule

LOOP_FIELDS = ("max_loops", "min_loops", "halting_strategy", "exit_threshold")


class LoopedConfig(Protocol):
    """The fields that the config of every looped model has, besides those of transformers.

    `LoopFields` has what such classes share. A checkpoint format with other names maps them to
    these, so that `hf_overrides` and request knobs have the same meaning for all models.
    """

    max_loops: int
    min_loops: int
    exit_threshold: float
    halting_strategy: str
    base_model_name_or_path: str | None  # its tokenizer is used if the checkpoint has none
    model_type: ClassVar[str]
    vocab_size: int

    @property
    def exact_context(self) -> int | None:
        """The longest sequence whose K/V does not depend on its length; None for no limit."""
        ...

    def check(self) -> None:
        """Raises `ValueError` with field, value and fix if the fields are inconsistent."""
        ...

    def check_served(self) -> None:
        """Raises `ValueError` for fields that only the reference model knows."""
        ...

    def get_text_config(self) -> Any:
        """The config that contains the sizes of the layers and the vocabulary."""
        ...


@dataclass(frozen=True)
class LoopLayers:
    """The layers that run once before the loop, in every pass, and once after the loop."""

    encoder: Sequence[int]
    reasoning: Sequence[int]
    decoder: Sequence[int]
    injects: bool = False  # whether every pass also takes a constant input from the encoder


@dataclass(frozen=True)
class Architecture:
    """One looped architecture.

    - `name`: as in `architectures` of config.json. `family`: the name in messages.
    - `config_class`: implements `LoopedConfig`.
    - `model`: the vLLM model, which implements `serving/model/seam.py`.
    - `reference`: the transformers model that defines the correct answers, a `LoopedReference`
      (`modeling/looped_model.py`), for `AutoModelForCausalLM`; None if there is none.
    - `exit_rule`: the class of its exit rules. `layers`: a function of the config.
    - `served_fields`: the config fields that `hf_overrides` may change and that determine exit
      depths, by their names here. Those that are no knobs of a request are refused there.
    - `released_names`: what the checkpoint format calls some of them -> our names.
    - `settle`: finds out what only the tensors of a checkpoint tell, from its config, source and
      revision. None if the config says everything.
    - `variant`: names the kind of a checkpoint, where a family has several.
    - `first_state`: for a model whose first state is drawn, not encoded: checks the engine's option
      `initial_state` (None if it is not given) and returns how many positions there are; None for
      no limit. Both raise `ValueError`.

    Model classes are given as `module:Class` and imported when they are first used, because they
    need torch or vLLM.
    """

    name: str
    family: str
    config_class: type[PreTrainedConfig]
    model: str
    reference: str | None
    exit_rule: type[ExitRule]
    layers: Callable[[Any], LoopLayers]
    served_fields: tuple[str, ...] = LOOP_FIELDS
    released_names: Mapping[str, str] = field(default_factory=dict)
    settle: Callable[[Any, str, str | None], None] | None = None
    variant: Callable[[Any], str] | None = None
    first_state: Callable[[Any, str | None], int | None] | None = None
