"""Passes whose outcome has not been read: which tokens exited, and whether states are finite."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints
from vllm_loopus.serving.step.clock import DeviceClock
from vllm_loopus.serving.step.interface import Reading, StepExecutor
from vllm_loopus.serving.step.staircase import Staircases

Call = tuple[Chunks, int, Ints, int]  # chunks, passes over them, life of the sequences, number


@dataclass
class Launched:
    """Passes whose outcome has not been read.

    - `life`: of their sequences at the launch. `covers`: the calls whose states the reading checks.
    - `timed`: takes the seconds of the call.
    """

    chunks: Chunks
    deciding: Ints
    reading: Reading
    life: Ints
    covers: list[Call]
    timed: Callable[[float], None]


class UnreadPasses:
    """Calls of passes, from their launch to the use of their outcome.

    `pending`: those with exits to be read, in the order of their launch.
    """

    def __init__(
        self,
        stairs: Staircases,
        executor: StepExecutor,
        clock: DeviceClock,
        observe: Callable[[Ints, Ints, Bools], None],
    ) -> None:
        """`observe`: is told of which sequences the exit rule was asked about, at which depths, and
        what it said."""
        self._stairs = stairs
        self._executor = executor
        self._observe = observe
        self._clock = clock
        self.pending: list[Launched] = []
        self._count = 0
        self._uncovered: list[Call] = []  # passes that no reading covers yet
        self._afterwards: list[tuple[Launched, Ints, Ints, Bools, Bools]] = []

    def add(
        self,
        batch: Chunks,
        passes: int,
        deciding: Ints,
        reading: Reading | None,
        timed: Callable[[float], None],
    ) -> None:
        """Passes over `batch` have been launched; `reading` has the exits of the chunks
        `deciding`."""
        life = self._stairs.life[batch.sequence]
        self._count += 1
        self._uncovered.append((batch, passes, life, self._count))
        if reading is not None:
            covers = self.take_covered()
            self.pending.append(Launched(batch, deciding, reading, life, covers, timed))

    def take_covered(self) -> list[Call]:
        """A reading is queued: the calls whose states it checks, those since the last one."""
        covers, self._uncovered = self._uncovered, []
        return covers

    def read(self) -> None:
        """Reads the outcome of the passes that were launched first."""
        launched = self.pending.pop(0)
        stairs, chunks, deciding = self._stairs, launched.chunks, launched.deciding
        with self._clock.waiting() as seconds:
            exits = launched.reading.wait()
        if seconds:
            launched.timed(seconds[0])
        index, depth = chunks.sequence[deciding], chunks.depth[deciding]
        slot = chunks.end[deciding] - stairs.done[index, 0]
        # Not those that were removed since, or went on to another position, or had exited before.
        valid = (launched.life[deciding] == stairs.life[index]) & (slot >= 0)
        valid &= slot <= stairs.ahead[index]
        valid &= stairs.undecided(index, np.where(valid, slot, 0))
        index, depth, slot = index[valid], depth[valid], slot[valid]
        leaving = np.zeros(len(deciding), dtype=bool)
        leaving[valid] = exits = stairs.decide(index, depth, exits[valid], slot)
        certain = slot == 0
        seen = index[certain], depth[certain], exits[certain]
        self._afterwards.append((launched, *seen[:2], leaving, seen[2]))

    def complete(self) -> None:
        """What the next launch does not depend on, once it is launched."""
        for launched, index, depth, leaving, exits in self._afterwards:
            launched.reading.complete(leaving)
            self.cover(launched.covers)
            self._observe(index, depth, exits)
        self._afterwards.clear()

    def cover(self, covers: list[Call]) -> None:
        """The passes are over, and the states of sequences that have not failed are finite."""
        for chunks, passes, life, _ in covers:
            index = chunks.sequence
            there = (life == self._stairs.life[index]) & ~self._stairs.failed[index]
            self._stairs.settle(chunks if there.all() else chunks[there], passes)

    def check(self) -> None:
        """Reads whether the states of passes without a reading are finite."""
        if (reading := self._executor.check_states()) is not None:
            reading.wait()
            self.cover(self.take_covered())

    def read_all(self) -> None:
        """Reads all passes, before anything uses blocks that they may have filled with NaN."""
        while self.pending:
            self.read()
        self.check()
        self.complete()
        self._executor.trust(self.oldest)

    def _calls(self) -> list[Call]:
        return [*(call for one in self.pending for call in one.covers), *self._uncovered]

    @property
    def oldest(self) -> int:
        """The number of the oldest call that has not been read."""
        calls = self._calls()
        return calls[0][3] if calls else self._count + 1

    def over(self, index: int) -> int:
        """The newest call over a sequence that has not been read; 0 if there is none."""
        of_it = [c[3] for c in self._calls() if np.count_nonzero(c[0].sequence == index)]
        return max(of_it, default=0)

    def possible(self, active: Ints) -> Ints:
        """The sequences that have exited, or may in the pass under way; none if some of these have
        gone on to another pass."""
        stairs, (pending,) = self._stairs, self.pending
        chosen = pending.deciding
        certain = pending.chunks.end[chosen] == stairs.done[pending.chunks.sequence[chosen], 0]
        chosen = chosen[certain]
        deciding = pending.chunks.sequence[chosen]
        there = pending.life[chosen] == stairs.life[deciding]
        mask = np.zeros(stairs.capacity, dtype=bool)
        mask[deciding] = there
        possible = active[(mask[active] & stairs.undecided(active)) | stairs.ready(active)]
        at = pending.chunks.depth[chosen]
        further = mask[deciding] & stairs.undecided(deciding) & (stairs.depth[deciding] != at)
        return possible[:0] if np.count_nonzero(further) else possible
