"""How a request ended, in its statistics (`RequestOutput.metrics`).

Ray Data LLM only passes on the text, token ids and statistics of an output. So the statistics also
contain exit depths and the reason of a failure.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.stats import RequestStateStats

from vllm_loopus.serving.messages.exit_depths import SPAN


@dataclass
class LoopedRequestStats(RequestStateStats):
    """vLLM's statistics of a request to a looped model, and its outcome so far."""

    exit_depths: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


def add_outcome(stats: RequestStateStats, completion: Any) -> None:
    """Adds the outcome of a completion that was just built. Statistics of other models are not
    changed."""
    depths = getattr(completion, SPAN, None)
    failed = completion.finish_reason == "error"
    if depths is None and not failed:
        return
    stats.__class__ = LoopedRequestStats
    stats.exit_depths = depths[0] if depths is not None else []
    stats.finish_reason, stats.stop_reason = completion.finish_reason, completion.stop_reason
