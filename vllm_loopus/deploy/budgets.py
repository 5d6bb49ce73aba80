"""What a request may cost: its loop budget, in passes."""

from collections.abc import Mapping
from typing import Any

from vllm_loopus.serving.knobs.names import TOKEN_LIMITS


def loop_budget(
    request: Any,
    max_loops: int,
    default_tokens: int,
    efforts: Mapping[str, int] | None = None,
) -> int:
    """The most passes that a request's tokens may take: loops a token times tokens, `n` times.

    `request`: a parsed body of the OpenAI API. `max_loops`: the served budget; `default_tokens`:
    for a request without a limit; `efforts`: the engine's `reasoning_effort`. Depths that the
    request gives (`exit_depths`) count as they are. What is malformed counts as if it were not
    there: the engine refuses it.
    """
    xargs = getattr(request, "vllm_xargs", None)
    knobs: Mapping[str, Any] = xargs if isinstance(xargs, Mapping) else {}
    effort = (efforts or {}).get(getattr(request, "reasoning_effort", None) or "", max_loops)
    loops = _whole(knobs.get("max_loops")) or effort
    limits = (_whole(getattr(request, name, None)) for name in TOKEN_LIMITS)
    tokens = next((limit for limit in limits if limit), default_tokens)
    depths = knobs.get("exit_depths")
    given = [_whole(depth) for depth in depths[:tokens]] if isinstance(depths, list) else []
    of_depths = sum(min(depth, max_loops) for depth in given)
    of_a_choice = of_depths + min(loops, max_loops) * (tokens - len(given))
    return of_a_choice * (_whole(getattr(request, "n", None)) or 1)


def _whole(value: Any) -> int:
    """A number of one or more, or 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
