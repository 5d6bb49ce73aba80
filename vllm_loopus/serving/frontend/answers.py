"""Additions to answers of the OpenAI server: exit depths, in complete answers and in server-sent
events, and the reason of a failed request."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from vllm_loopus.serving.messages.exit_depths import exit_depths


def depth_fields(depths: list[int]) -> dict[str, Any]:
    """The fields of a choice: the exit depths of its tokens, and their mean (None for none)."""
    mean = round(sum(depths) / len(depths), 4) if depths else None
    return {"exit_depths": depths, "mean_exit_depth": mean}


def mark(answer: Any, depths: list[int]) -> None:
    """Adds the fields to a response, or to one of its choices."""
    for name, value in depth_fields(depths).items():
        setattr(answer, name, value)


class FailureReason(str):
    """The finish reason "error" of a completion, with the reason why."""

    why: str


def explain_failure(completion: Any) -> None:
    """Adds the stop reason of a failed completion to its finish reason, because the server only
    has the latter when it raises its error."""
    if completion.finish_reason == "error" and isinstance(completion.stop_reason, str):
        reason = FailureReason(completion.finish_reason)
        reason.why = completion.stop_reason
        completion.finish_reason = reason


class DepthRecorder:
    """Collects the exit depths of each choice of a request while its outputs are streamed."""

    def __init__(self) -> None:
        self.depths: dict[int, list[int]] = {}

    def add(self, outputs: Iterable[Any], first: int = 0) -> None:
        """Adds `CompletionOutput`s, deltas or complete. `first`: the choice of the index 0."""
        for output in outputs:
            self.depths.setdefault(first + output.index, []).extend(exit_depths(output))

    async def stream(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        """Server-sent events. The chunk with a choice's finish reason gets the fields."""
        async for chunk in chunks:
            if not chunk.startswith("data: {"):
                yield chunk
                continue
            event = json.loads(chunk.removeprefix("data: "))
            finished = [c for c in event.get("choices", ()) if c.get("finish_reason")]
            for choice in finished:
                choice.update(depth_fields(self.depths.get(choice["index"], [])))
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n" if finished else chunk
