"""Blocks of deeper planes, between scheduler and worker.

A sequence gets blocks of depth 1 from the scheduler. How deep it goes is known inside a step only,
so the worker gives it blocks of deeper planes in the pass that needs them, out of the free ones
that came with the step; the scheduler books afterwards what was taken. So a block is in use as soon
as it holds a position, and not before. All ranks take the same decisions from the same data.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

OFFER = "loopus_blocks"  # attribute of a SchedulerOutput


@dataclass(frozen=True)
class BlockOffer:
    """What a step may take: ids of `free` blocks, the next to be reused first, of which each
    sequence may count on as many as are `promised` to it."""

    free: Sequence[int] = ()
    promised: dict[str, int] = field(default_factory=dict)


class TakenBlock(NamedTuple):
    """The worker has put `block_id` into `column` of a sequence's table at `depth`."""

    depth: int
    column: int
    block_id: int


class StepBlocks:
    """The offer of a step, as it is used up."""

    def __init__(self, offer: BlockOffer) -> None:
        self._free = deque(offer.free)
        self._promised = dict(offer.promised)
        self._common = len(self._free) - sum(self._promised.values())
        assert self._common >= 0, "more blocks promised than offered"

    def available(self, request_id: str) -> int:
        """How many blocks the sequence may take."""
        return self._promised.get(request_id, 0) + self._common

    def take(self, request_id: str) -> int:
        """A block's id, from what was promised to the sequence while there is any."""
        if self._promised.get(request_id):
            self._promised[request_id] -= 1
        else:
            assert self._common, "no block left"
            self._common -= 1
        return self._free.popleft()


class Demand:
    """What sequences end up with, learned: planes of a block by recursion budget, new tokens.

    Before any has finished, all planes of the budget are expected, and no new tokens.
    """

    MEMORY = 50  # sequences, roughly

    def __init__(self) -> None:
        self.new_tokens = 0.0
        self.mean_planes: float | None = None  # of all sequences, once one has finished
        self._finished = 0
        self._planes: dict[int, float] = {}
        self._seen: dict[int, int] = {}

    def observe(self, budget: int, planes: float, new_tokens: int) -> None:
        """A sequence has finished with `planes` blocks for each of depth 1."""
        seen = self._seen[budget] = min(self._seen.get(budget, 1) + 1, self.MEMORY)
        self._planes[budget] = self.planes(budget) + (planes - self.planes(budget)) / seen
        self._finished = min(self._finished + 1, self.MEMORY)
        self.new_tokens += (new_tokens - self.new_tokens) / self._finished
        mean = planes if self.mean_planes is None else self.mean_planes
        self.mean_planes = mean + (planes - mean) / self._finished

    def planes(self, budget: int) -> float:
        """Blocks that a sequence is expected to end up with for each of depth 1."""
        return self._planes.get(budget, float(budget))
