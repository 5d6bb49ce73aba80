"""What a user may set: per engine in `additional_config`, per request in `extra_args`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.serving.knob_names import REQUEST_KNOBS, RETURN_EXIT_DEPTHS, objection

SECTION = "loopus"  # of additional_config
KV_POLICIES = ("exact", "last_exited")
PREFILL_DEPTHS = ("lazy", "full")
AUTO = "auto"
# What the OpenAI server takes as `reasoning_effort` (vLLM's ChatCompletionRequest).
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class KnobError(VLLMValidationError, ValueError):
    """A knob of a request that cannot be: HTTP 400 naming the parameter, offline a `ValueError`."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter)


@dataclass(frozen=True)
class EngineOptions:
    """`additional_config={"loopus": {...}}`.

    - `kv_policy`: `exact` computes what deeper tokens need of shallower ones; `last_exited` gives
      the K/V and state of the exit depth to all deeper depths instead, an approximation.
    - `prefill_depth`: `lazy` takes a prompt to the depth at which its last position leaves, and
      deeper when a later token goes there; `full` takes it to the full depth at once.
    - `exit_quorum`: the share of the sequences in flight that must have left before a step decodes
      and samples them, or `auto`.
    - `reasoning_effort`: `max_loops` of requests that name an effort and no `max_loops`, for
      example `{"low": 2, "high": 8}`. Efforts not listed, and by default all, change nothing.
    """

    kv_policy: str = "exact"
    prefill_depth: str = "lazy"
    exit_quorum: float | str = AUTO
    reasoning_effort: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, additional_config: Any) -> "EngineOptions":
        """Raises `ValueError` naming the option, its value and the fix."""
        outer = additional_config if isinstance(additional_config, Mapping) else {}
        known = [field.name for field in fields(cls)]
        for name in known:
            if name in outer:
                raise ValueError(
                    f"additional_config[{name!r}]={outer[name]!r} has no effect there; "
                    f"put it into additional_config[{SECTION!r}]"
                )
        given = outer.get(SECTION)
        if given is None:
            return cls()
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
        _check_efforts(options.reasoning_effort)
        return options

    def check(self, config: LoopUSConfig) -> None:
        """Raises `ValueError` for an option that does not fit the model."""
        for effort, loops in self.reasoning_effort.items():
            if loops > config.max_loops:
                raise ValueError(
                    f"reasoning_effort[{effort!r}]={loops} must be at most the served "
                    f"max_loops={config.max_loops}"
                )

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

        Raises `KnobError` (HTTP 400) naming the parameter, its value and the fix.
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


def check_request(
    extra_args: Mapping[str, Any] | None,
    config: LoopUSConfig,
    max_tokens: int | None,
    max_model_len: int,
    custom_processors: bool = False,
) -> None:
    """What admission checks: names and values of a request's knobs.

    `custom_processors`: the engine has logits processors of the user's, whose arguments travel in
    the same place (see `knob_names`). Raises `KnobError` (HTTP 400).
    """
    given = extra_args or {}
    check_names(given, custom_processors)
    depths = given.get("exit_depths")
    most = max_model_len if max_tokens is None else min(max_tokens, max_model_len)
    if isinstance(depths, list | tuple) and len(depths) > most:
        limit = "max_model_len" if most == max_model_len else "max_tokens"
        message = f"has {len(depths)} entries, one a generated token; {limit} is {most}"
        raise KnobError(f"exit_depths {message}", parameter="exit_depths")
    if given.get(RETURN_EXIT_DEPTHS) not in (None, 0, 1):
        _refuse(RETURN_EXIT_DEPTHS, given[RETURN_EXIT_DEPTHS], "must be 0, 1, true or false")
    RequestKnobs.of(given, config)


def check_names(given: Iterable[str], custom_processors: bool = False) -> None:
    """Raises `KnobError` for a name that was meant to be a knob of ours and is none."""
    for name in given:
        if name not in REQUEST_KNOBS and (reason := objection(name, custom_processors)):
            raise KnobError(f"{_shown(name)} {reason}", parameter=name[:100])


def _check_efforts(efforts: Any) -> None:
    if not isinstance(efforts, Mapping):
        raise ValueError(
            f"reasoning_effort={efforts!r} must be a mapping of efforts to loops, for example "
            '{"low": 2, "high": 8}'
        )
    for effort, loops in efforts.items():
        if effort not in EFFORTS:
            raise ValueError(
                f"reasoning_effort has no effort {effort!r}; there are {', '.join(EFFORTS)}"
            )
        if not _is_integer(loops) or loops < 1:
            raise ValueError(
                f"reasoning_effort[{effort!r}]={loops!r} must be a whole number, 1 or more"
            )


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
    try:
        return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _refuse(name: str, value: Any, fix: str) -> None:
    raise KnobError(f"{name}={_shown(value)} {fix}", parameter=name.partition("[")[0])


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "<a huge integer>"
    return shown if len(shown) <= 100 else shown[:100] + "..."
