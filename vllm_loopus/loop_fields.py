"""The fields that the configs of all looped models share, and checks of their values."""

import math
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError

MAX_RECURSION_DEPTH = 256  # a larger value is certainly a mistake


class LoopFields:
    """The loop of a config. Stands before `PreTrainedConfig` in the bases of a config class.

    A class has the fields `max_loops`, `min_loops`, `exit_threshold`, `halting_strategy` and
    `base_model_name_or_path`, or maps those of its checkpoints to them (`attribute_map` in
    transformers, or a property). Values of a wrong type raise `ValueError` when they are set.
    """

    halting_strategies: ClassVar[tuple[str, ...]] = ()
    # Fields that must be whole numbers, and fields that must be finite numbers.
    integers: ClassVar[tuple[str, ...]] = ("max_loops", "min_loops")
    numbers: ClassVar[tuple[str, ...]] = ("exit_threshold",)
    attribute_map: ClassVar[dict[str, str]] = {}

    max_loops: Any
    min_loops: Any
    exit_threshold: Any
    halting_strategy: Any

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.integers or self.attribute_map.get(key) in self.integers:
            check_integer(key, value)
        elif key in self.numbers or self.attribute_map.get(key) in self.numbers:
            check_number(key, value)
        try:
            super().__setattr__(key, value)
        except StrictDataclassError as error:
            raise ValueError(f"{key}={value!r} does not have the right type: {error}") from error

    @property
    def exact_context(self) -> int | None:
        """The longest sequence whose K/V does not depend on its length; None for no limit."""
        return None

    def check_served(self) -> None:
        """Raises `ValueError` for fields that only the reference model knows."""

    def check_loops(self) -> None:
        """Raises `ValueError` with field, value and fix if the loop's fields are inconsistent."""
        if not 1 <= self.max_loops <= MAX_RECURSION_DEPTH:
            raise ValueError(
                f"{self._named('max_loops')} must be from 1 to {MAX_RECURSION_DEPTH}; it is the "
                "recursion budget"
            )
        if not 1 <= self.min_loops <= self.max_loops:
            raise ValueError(
                f"min_loops={self.min_loops} must be from 1 to max_loops={self.max_loops}; "
                "lower min_loops or raise max_loops"
            )
        check_choice("halting_strategy", self.halting_strategy, self.halting_strategies)
        if self.exit_threshold < 0:
            raise ValueError(f"{self._named('exit_threshold')} must be 0 or more")

    def _named(self, name: str) -> str:
        """A field with its value, and how the checkpoint calls it."""
        theirs = self.attribute_map.get(name)
        also = f" ({theirs})" if theirs else ""
        return f"{name}={getattr(self, name)}{also}"


def is_integer(value: object) -> bool:
    """Whether `value` is a whole number; `True` and `False` are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: object) -> bool:
    """Whether `value` is a number in the range of floats and neither NaN nor infinite."""
    try:
        return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
    except OverflowError:  # an integer outside the range of floats
        return False


def check_integer(name: str, value: object) -> None:
    """Raises `ValueError` if the field `name` is not a whole number."""
    if not is_integer(value):
        raise ValueError(f"{name}={value!r} must be a whole number")


def check_number(name: str, value: object) -> None:
    """Raises `ValueError` if the field `name` is not a finite number."""
    if not is_finite_number(value):
        raise ValueError(f"{name}={value!r} must be a finite number")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` if the field `name` is none of the `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
