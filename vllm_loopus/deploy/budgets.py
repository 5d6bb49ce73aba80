"""The loop budget of a request: the maximum number of passes of its tokens."""

from collections.abc import Mapping
from typing import Any

from vllm_loopus.serving.knobs.names import TOKEN_LIMITS


def loop_budget(
    request: Any,
    max_loops: int,
    default_tokens: int,
    efforts: Mapping[str, int] | None = None,
) -> int:
    """The maximum number of passes of a request: loops per token times tokens times `n`.

    - `request`: a parsed body of the OpenAI API. Its `exit_depths` are used if given; malformed
      fields are ignored, because the engine will refuse the request.
    - `max_loops`: that of the engine. `default_tokens`: for requests without a limit. `efforts`:
      the engine option `reasoning_effort`.
    """
    xargs = getattr(request, "vllm_xargs", None)
    knobs: Mapping[str, Any] = xargs if isinstance(xargs, Mapping) else {}
    effort = (efforts or {}).get(getattr(request, "reasoning_effort", None) or "", max_loops)
    loops = _whole(knobs.get("max_loops")) or effort
    limits = (_whole(getattr(request, name, None)) for name in TOKEN_LIMITS)
    tokens = next((limit for limit in limits if limit), default_tokens)
    depths = knobs.get("exit_depths")
    given = [_whole(depth) for depth in depths[:tokens]] if isinstance(depths, list) else []
    at_given_depths = sum(min(depth, max_loops) for depth in given)
    per_choice = at_given_depths + min(loops, max_loops) * (tokens - len(given))
    return per_choice * (_whole(getattr(request, "n", None)) or 1)


def _whole(value: Any) -> int:
    """`value` if it is a positive whole number, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
