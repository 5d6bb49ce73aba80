"""Knobs of one request: `SamplingParams.extra_args`, over HTTP `vllm_xargs`.

They are checked at admission, which refuses bad ones: in vLLM's input processor
(`hooks/patches.py`), and over HTTP also in the handler, before an answer begins
(`frontend/http.py`). The engine core parses them once more and carries them with the request from
there on (`core/admission.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vllm.exceptions import VLLMValidationError

from vllm_loopus.loop_fields import is_finite_number, is_integer
from vllm_loopus.serving.knobs.names import (
    GUESSES,
    REQUEST_KNOBS,
    RETURN_EXIT_DEPTHS,
    SPECULATE,
    objection,
)


class KnobError(VLLMValidationError, ValueError):
    """A knob with an impossible value: HTTP 400 that names the parameter; offline, `ValueError`."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter)


class LoopDefaults(Protocol):
    """The fields of a looped model's config that knobs override."""

    max_loops: int
    min_loops: int
    exit_threshold: float


@dataclass(frozen=True)
class RequestKnobs:
    """The recursion budget and exit rule knobs of one request.

    `exit_depths` gives the exit depths of the first generated tokens. The exit rule decides for all
    tokens after them. `speculate`: whether positions may begin with guessed tokens, where the
    engine does that. `guesses`: for the first generated tokens, whether the guess counts as right,
    1 or 0, whatever the tokens: a replay for benchmarks, whose answers mean nothing. `seed`: of the
    first state, where that is noise; None for the engine's.
    """

    max_loops: int
    min_loops: int
    exit_threshold: float
    exit_depths: tuple[int, ...] = ()
    speculate: bool = True
    guesses: tuple[int, ...] = ()
    seed: int | None = None

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None, defaults: LoopDefaults) -> "RequestKnobs":
        """Knobs of a request; what it does not set comes from the model's config.

        Raises `KnobError` that names the parameter, its value and the fix.
        """
        given = extra_args or {}
        served = defaults.max_loops
        max_loops = _loops(given, "max_loops", served, served, "the served ")
        default_min = min(defaults.min_loops, max_loops)
        min_loops = _loops(given, "min_loops", default_min, max_loops)
        threshold = given.get("exit_threshold")
        if threshold is None:
            threshold = defaults.exit_threshold
        elif not is_finite_number(threshold) or threshold < 0:
            raise _refusal("exit_threshold", threshold, "must be a finite number, 0 or more")
        depths = given.get("exit_depths")
        if depths is None:
            depths = ()
        elif not isinstance(depths, list | tuple) or not all(map(is_integer, depths)):
            fix = "must be a list of whole numbers, one for each generated token"
            raise _refusal("exit_depths", depths, fix)
        for index, depth in enumerate(depths):
            if not 1 <= depth <= max_loops:
                fix = f"must be from 1 to max_loops={max_loops}"
                raise _refusal(f"exit_depths[{index}]", depth, fix)
        speculate = given.get(SPECULATE)
        if speculate not in (None, 0, 1):
            fix = "must be 0 (no guesses for this request) or 1, true or false"
            raise _refusal(SPECULATE, speculate, fix)
        guesses = given.get(GUESSES)
        if guesses is None:
            guesses = ()
        elif not isinstance(guesses, list | tuple) or not all(one in (0, 1) for one in guesses):
            raise _refusal(GUESSES, guesses, "must be a list of 0 and 1, one for each token")
        return cls(
            max_loops,
            min_loops,
            float(threshold),
            tuple(depths),
            speculate in (None, True),
            tuple(map(int, guesses)),
        )


def check_request(
    extra_args: Mapping[str, Any] | None,
    defaults: LoopDefaults,
    max_tokens: int | None,
    max_model_len: int,
    custom_processors: bool = False,
) -> None:
    """Checks names and values of a request's knobs, before it is admitted.

    `custom_processors`: the engine has logits processors of the user's, whose arguments are in the
    same mapping (see `names.py`). Raises `KnobError` (HTTP 400).
    """
    given = extra_args or {}
    check_names(given, custom_processors)
    most = max_model_len if max_tokens is None else min(max_tokens, max_model_len)
    for name in ("exit_depths", GUESSES):
        replayed = given.get(name)
        if isinstance(replayed, list | tuple) and len(replayed) > most:
            limit = "max_model_len" if most == max_model_len else "max_tokens"
            message = f"has {len(replayed)} entries, one for each generated token; "
            raise KnobError(f"{name} {message}{limit} is {most}", parameter=name)
    if given.get(RETURN_EXIT_DEPTHS) not in (None, 0, 1):
        raise _refusal(RETURN_EXIT_DEPTHS, given[RETURN_EXIT_DEPTHS], "must be 0, 1, true or false")
    RequestKnobs.of(given, defaults)


def check_names(given: Iterable[str], custom_processors: bool = False) -> None:
    """Raises `KnobError` for a name that looks like one of our knobs but is none."""
    for name in given:
        if name not in REQUEST_KNOBS and (reason := objection(name, custom_processors)):
            raise KnobError(f"{_shown(name)} {reason}", parameter=name[:100])


def _loops(given: Mapping[str, Any], name: str, default: int, most: int, whose: str = "") -> int:
    value = given.get(name)
    if value is None:
        return default
    if not is_integer(value) or not 1 <= value <= most:
        raise _refusal(name, value, f"must be a whole number from 1 to {whose}max_loops={most}")
    return int(value)


def _refusal(name: str, value: object, fix: str) -> KnobError:
    return KnobError(f"{name}={_shown(value)} {fix}", parameter=name.partition("[")[0])


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "<a huge integer>"
    return shown if len(shown) <= 100 else shown[:100] + "..."
