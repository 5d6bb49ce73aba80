"""What the answers of the OpenAI server say besides the text: exit depths, whole or as server-sent
events, and why a request failed."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from vllm_loopus.serving.depths import exit_depths


def depth_fields(depths: list[int]) -> dict[str, Any]:
    """What an answer says of a choice: exit depths of its tokens, their mean (None for none)."""
    mean = round(sum(depths) / len(depths), 4) if depths else None
    return {"exit_depths": depths, "mean_exit_depth": mean}


def mark(answer: Any, depths: list[int]) -> None:
    """Puts the fields into a response, or into one of its choices."""
    for name, value in depth_fields(depths).items():
        setattr(answer, name, value)


class FailureReason(str):
    """The finish reason "error" of a completion that says why (`why`)."""

    why: str


def explain(completion: Any) -> None:
    """Lets the finish reason of a failed completion carry its stop reason along, for the server
    raises its error with nothing else at hand."""
    if completion.finish_reason == "error" and isinstance(completion.stop_reason, str):
        reason = FailureReason(completion.finish_reason)
        reason.why = completion.stop_reason
        completion.finish_reason = reason


class DepthRecorder:
    """Collects the exit depths of each choice of a request while its outputs pass by."""

    def __init__(self) -> None:
        self.depths: dict[int, list[int]] = {}

    def add(self, outputs: Iterable[Any], first: int = 0) -> None:
        """`CompletionOutput`s, deltas or whole; `first` is the choice of the one with index 0."""
        for output in outputs:
            self.depths.setdefault(first + output.index, []).extend(exit_depths(output))

    async def stream(self, chunks: AsyncIterator[str]) -> AsyncIterator[str]:
        """Server-sent events; the chunk with a choice's finish reason gets the fields."""
        async for chunk in chunks:
            if not chunk.startswith("data: {"):
                yield chunk
                continue
            event = json.loads(chunk.removeprefix("data: "))
            finished = [c for c in event.get("choices", ()) if c.get("finish_reason")]
            for choice in finished:
                choice.update(depth_fields(self.depths.get(choice["index"], [])))
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n" if finished else chunk
