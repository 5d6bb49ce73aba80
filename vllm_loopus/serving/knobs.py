"""What a user may set: per engine in `additional_config`, per request in `extra_args`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_loopus.config import LoopUSConfig

SECTION = "loopus"  # of additional_config
KV_POLICIES = ("exact", "last_exited")
PREFILL_DEPTHS = ("lazy", "full")
AUTO = "auto"


@dataclass(frozen=True)
class EngineOptions:
    """`additional_config={"loopus": {...}}`.

    - `kv_policy`: `exact` computes what deeper tokens need of shallower ones; `last_exited` gives
      the K/V and state of the exit depth to all deeper depths instead, an approximation.
    - `prefill_depth`: `lazy` takes a prompt to the depth at which its last position leaves, and
      deeper when a later token goes there; `full` takes it to the full depth at once.
    - `exit_quorum`: the share of the sequences in flight that must have left before a step decodes
      and samples them, or `auto`.
    """

    kv_policy: str = "exact"
    prefill_depth: str = "lazy"
    exit_quorum: float | str = AUTO

    @classmethod
    def of(cls, additional_config: Any) -> "EngineOptions":
        """Raises `ValueError` naming the option, its value and the fix."""
        given = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
        if given is None:
            return cls()
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise ValueError(
                f"additional_config[{SECTION!r}]={given!r} must be a mapping of {', '.join(known)}"
            )
        for name in given:
            if name not in known:
                raise ValueError(
                    f"additional_config[{SECTION!r}] has no option {name!r}; "
                    f"there are {', '.join(known)}"
                )
        options = cls(**given)
        for name, choices in (("kv_policy", KV_POLICIES), ("prefill_depth", PREFILL_DEPTHS)):
            if getattr(options, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(options, name)!r} is unknown; choose one of "
                    f"{', '.join(choices)}"
                )
        quorum = options.exit_quorum
        if quorum != AUTO and not (_is_number(quorum) and 0 < quorum <= 1):  # type: ignore[operator]
            raise ValueError(
                f"exit_quorum={quorum!r} must be a number above 0 and at most 1, or {AUTO!r}"
            )
        return options

    @property
    def takes_over(self) -> bool:
        """Whether deeper depths take over what a token has where it leaves."""
        return self.kv_policy == "last_exited"

    @property
    def full_prefill(self) -> bool:
        """Whether prompts run to the full depth, wherever their last position leaves."""
        return self.prefill_depth == "full"

    def planes(self, max_loops: int, served: int) -> int:
        """The planes that positions of a request with the budget `max_loops` may need.

        In `last_exited` K/V is shared between requests of equal knobs only.
        """
        return served if self.full_prefill and not self.takes_over else max_loops


@dataclass(frozen=True)
class RequestKnobs:
    """The recursion budget and halting knobs of one request.

    `exit_depths` gives the exit depth of the first tokens generated instead of asking the
    confidence head; tokens after the last one given ask it.
    """

    max_loops: int
    min_loops: int
    exit_threshold: float
    exit_depths: tuple[int, ...] = ()

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None, config: LoopUSConfig) -> "RequestKnobs":
        """Knobs of a request over the checkpoint's defaults.

        Raises `VLLMValidationError` (HTTP 400) naming the parameter, its value and the fix.
        """
        given = extra_args or {}
        max_loops = _loops(given, "max_loops", config.max_loops, config.max_loops, "the served ")
        default_min = min(config.min_loops, max_loops)
        min_loops = _loops(given, "min_loops", default_min, max_loops)
        threshold = given.get("exit_threshold")
        if threshold is None:
            threshold = config.exit_threshold
        elif not _is_number(threshold) or threshold < 0:
            _refuse("exit_threshold", threshold, "must be a finite number, 0 or more")
        depths = given.get("exit_depths")
        if depths is None:
            depths = ()
        elif not isinstance(depths, list | tuple) or not all(_is_integer(d) for d in depths):
            _refuse("exit_depths", depths, "must be a list of whole numbers, one a generated token")
        for index, depth in enumerate(depths):
            if not 1 <= depth <= max_loops:
                _refuse(f"exit_depths[{index}]", depth, f"must be from 1 to max_loops={max_loops}")
        return cls(max_loops, min_loops, float(threshold), tuple(depths))


def _loops(given: Mapping[str, Any], name: str, default: int, most: int, whose: str = "") -> int:
    value = given.get(name)
    if value is None:
        return default
    if not _is_integer(value) or not 1 <= value <= most:
        _refuse(name, value, f"must be a whole number from 1 to {whose}max_loops={most}")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(name: str, value: Any, fix: str) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else shown[:100] + "..."
    raise VLLMValidationError(f"{name}={shown} {fix}", parameter=name.partition("[")[0])
