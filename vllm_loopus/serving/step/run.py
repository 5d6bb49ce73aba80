"""One engine step of a looped model: encoder, passes over rows at mixed depths, decoder.

Plain control flow over an executor that does the computing. The property tests use a fake one.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.messages.progress import PassTimes
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.step.quorum import Quorum
from vllm_loopus.serving.step.staircase import Chunk, LoopedSequence


class StepExecutor(Protocol):
    """What a step needs computed. The chunks of one call may be at different depths.

    If a sequence `copies_on_exit`, the K/V and state of its newest row also go to all deeper depths
    when it exits, and the decoder's K/V to all depths at which a token may exit.
    """

    @property
    def asynchronous(self) -> bool:
        """Whether a call may return before the device has computed it. `run_passes` with exits to
        decide, `check_states` and `decode` always wait for the device."""
        ...

    def make_room(self, chunk: Chunk) -> int:
        """How many positions of the chunk, from the first, have blocks; takes new blocks."""
        ...

    def make_room_deeper(self, chunks: list[Chunk], passes: int) -> int:
        """How many of the next `passes` every chunk has blocks for; takes new blocks from the
        second pass on. The first pass is at the depths of the chunks, each later one a depth
        deeper."""
        ...

    def encode(self, chunks: list[Chunk]) -> None:
        """Depth 0: runs the encoder and stores `h^0` for the pass that follows."""
        ...

    def run_passes(self, chunks: list[Chunk], passes: int, deciding: list[int]) -> list[bool]:
        """Passes of the reasoning block over the same positions, one depth deeper each; `chunks`
        are at the depths of the last. In the first, chunks at depth 1 come first, as encoded.

        Returns for each index in `deciding` whether the exit rule lets that newest position exit
        after the last pass; no token exits earlier. A sequence with a NaN or infinite state fails
        here, in `decode` or in `check_states`.
        """
        ...

    def decode(self, chunks: list[Chunk]) -> None:
        """Runs the decoder and stores the hidden states of the newest positions of the chunks.
        Sequences with a NaN or infinite state, here or in the passes before, fail."""
        ...

    def check_states(self) -> None:
        """For a step without a decoder call: sequences with a NaN or infinite state fail."""
        ...


@dataclass
class StepReport:
    """What a step did.

    - `emitted`: sequences whose token can be sampled.
    - `passes`: rows of each pass; `times`: how long each took.
    - `encoded_rows`: new positions. `catch_up_rows`: rows of passes for positions before those.
    - `wanting`: sequences that wanted a token when the passes ended; `ready`: those of them that
      had exited. `waiting`: sequences that had exited before a pass, summed over the passes.
    """

    emitted: list[LoopedSequence] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    times: PassTimes = field(default_factory=PassTimes)
    encoded_rows: int = 0
    catch_up_rows: int = 0
    decoder_rows: int = 0
    waiting: int = 0
    ready: int = 0
    wanting: int = 0

    @property
    def boundary_rows(self) -> int:
        """Rows of decoder and encoder together; 0 without a decoder call."""
        return self.decoder_rows and self.decoder_rows + self.encoded_rows

    def stats(self) -> LoopStats:
        """What the step adds to the metrics."""
        return LoopStats(
            steps=[len(self.passes)],
            passes=list(self.passes),
            encoded_rows=self.encoded_rows,
            catch_up_rows=self.catch_up_rows,
            decoder_rows=self.decoder_rows,
            decoder_catch_up_rows=self.decoder_rows - len(self.emitted),
            quorums=[self.ready / self.wanting] if self.ready else [],
            waiting=self.waiting,
        )


def run_step(
    scheduled: Sequence[LoopedSequence],
    row_budget: int,
    quorum: Quorum,
    executor: StepExecutor,
    new_chunks: Sequence[Chunk] = (),
    costs: StepCosts | None = None,
) -> StepReport:
    """Refines the sequences in flight until the quorum ends the passes, then decodes.

    `new_chunks` (depth 0) belong to sequences that have just started; together they have at most
    `row_budget` rows. No pass and no decoder call has more rows than that. If more are needed, all
    sequences get an equal share, and the rest goes to those longest in flight, so that a long
    catch-up does not delay the next pass of others. A step has at most as many passes as there are
    depths, so waiting is bounded. A sequence without a block for its next plane waits for the next
    step.
    """
    step = _Step(scheduled, row_budget, quorum, executor)
    quorum.begin_step(costs)
    if new_chunks:
        step.encode(list(new_chunks))
    step.refine(max((sequence.max_depth for sequence in scheduled), default=0))
    step.decode()
    for sequence in scheduled:
        if sequence.refined and not sequence.wants_token:
            sequence.finish()
        sequence.age += 1
    return step.report


class _Step:
    """One step under way."""

    def __init__(
        self,
        scheduled: Sequence[LoopedSequence],
        row_budget: int,
        quorum: Quorum,
        executor: StepExecutor,
    ) -> None:
        self._scheduled = scheduled
        self._eldest_first = sorted(scheduled, key=lambda sequence: -sequence.age)
        self._budget = row_budget
        self._quorum = quorum
        self._executor = executor
        self._idle = True  # whether the device has nothing left to do
        self.report = StepReport()

    def encode(self, new_chunks: list[Chunk]) -> None:
        self._executor.encode(new_chunks)
        self._idle = not self._executor.asynchronous
        self.report.encoded_rows = sum(map(len, new_chunks))

    def refine(self, max_depth: int) -> None:
        """Runs passes until the quorum ends them or nothing is left to refine."""
        report = self.report
        while (left := max_depth - len(report.passes)) > 0:
            if not self._run_passes(left):
                break
            report.waiting += report.ready
            wanting = [s for s in self._scheduled if s.wants_token and s.in_flight]
            running = [s for s in wanting if not (s.refined or s.stalled)]
            report.ready = sum(s.refined for s in wanting)
            report.wanting = report.ready + len(running)
            if report.ready and self._quorum.ends(report.ready, running):
                break

    def _run_passes(self, most: int) -> bool:
        """Runs a pass over all sequences that have something to refine and get blocks, and, up to
        `most` in all, the passes after it that decide nothing. False if nothing is left to refine.
        """
        batch, complete = self._next_batch()
        if not batch:
            return False
        passes = self._passes_ahead(batch, most) if complete else 1
        if passes > 1:
            passes = self._executor.make_room_deeper(batch, passes)
            for chunk in batch:
                chunk.depth += passes - 1
        deciding = [i for i, chunk in enumerate(batch) if chunk.newest and chunk.sequence.undecided]
        started = time.perf_counter()
        exits = self._executor.run_passes(batch, passes, deciding)
        self._note_passes(batch, passes, time.perf_counter() - started, waited=bool(deciding))
        for chunk in batch:
            chunk.sequence.advance(chunk, passes)
        for index, exiting in zip(deciding, exits, strict=True):
            chunk = batch[index]
            if chunk.sequence.failure:
                continue
            chunk.sequence.decide(chunk.depth, exiting)
            self._quorum.observe(chunk.sequence, chunk.depth)
        return True

    def _next_batch(self) -> tuple[list[Chunk], bool]:
        """What the next pass computes, and whether that is all that is wanted.

        New positions come first and are never deferred, because `h^0` is not stored.
        """
        wanted = [chunks for s in self._eldest_first if (chunks := s.next_chunks())]
        in_all = sum(len(chunk) for chunks in wanted for chunk in chunks)
        batch = [chunk for chunks in wanted for chunk in chunks if chunk.depth == 1]
        deeper = [chunks for chunks in wanted if chunks[0].depth > 1]
        budget = self._budget - sum(map(len, batch))
        assert budget >= 0, "new positions exceed the row budget"
        for chunk in batch:
            room = self._executor.make_room(chunk)
            assert room == len(chunk), "blocks of new positions are promised"
        shares = _shares([sum(map(len, chunks)) for chunks in deeper], budget)
        for chunks, share in zip(deeper, shares, strict=True):
            batch += self._with_room(chunks, share)
        return batch, sum(map(len, batch)) == in_all

    def _with_room(self, chunks: Sequence[Chunk], share: int) -> Iterator[Chunk]:
        """Of a sequence's chunks, from the first, as much as its share and the free blocks hold."""
        for chunk in chunks:
            wanted = chunk.end
            chunk.end = min(wanted, chunk.start + share)
            share -= len(chunk)
            room = self._executor.make_room(chunk) if len(chunk) else 0
            chunk.sequence.stalled = room < len(chunk)
            chunk.end = chunk.start + room
            if room:
                yield chunk
            if chunk.end < wanted:
                return  # what comes after attends to all of it

    def _passes_ahead(self, batch: Sequence[Chunk], most: int) -> int:
        """How many passes over the positions of `batch` come before there is anything to decide.
        1 if a sequence waits for the decoder: the quorum is asked after each pass."""
        passes = most
        for chunk in batch:
            passes = min(passes, chunk.sequence.passes_ahead(chunk))
            if passes == 1:
                return 1
        return 1 if any(s.wants_token and s.refined for s in self._scheduled) else passes

    def _note_passes(
        self, batch: Sequence[Chunk], passes: int, seconds: float, waited: bool
    ) -> None:
        report, rows = self.report, sum(map(len, batch))
        done = waited or not self._executor.asynchronous
        report.times.seconds += [seconds / passes] * passes
        report.times.waited += [self._idle and done] * passes
        report.passes += [rows] * passes
        report.catch_up_rows += passes * sum(chunk.catch_up for chunk in batch)
        self._idle = report.times.ended_idle = done

    def decode(self) -> None:
        """Decodes the sequences that have exited, as far as the row budget goes."""
        wanted = [s.chunks_to_decode() for s in self._eldest_first if s.refined and s.wants_token]
        batch: list[Chunk] = []
        shares = _shares([sum(map(len, chunks)) for chunks in wanted], self._budget)
        for chunks, share in zip(wanted, shares, strict=True):
            for chunk in chunks:
                chunk.end = min(chunk.end, chunk.start + share)
                share -= len(chunk)
                if len(chunk):
                    batch.append(chunk)
        if not batch:
            self._executor.check_states()
            return
        self._executor.decode(batch)
        self.report.decoder_rows = sum(map(len, batch))
        for chunk in batch:
            if chunk.sequence.failure:
                continue
            chunk.sequence.advance_decoder(chunk)
            if chunk.newest:
                chunk.sequence.finish()
                self.report.emitted.append(chunk.sequence)


def _shares(wanted: Sequence[int], budget: int) -> list[int]:
    """How many rows each sequence gets: at least an equal share of `budget`, if it wants as much;
    what is left over goes to the first ones."""
    equal = budget // max(1, len(wanted))
    owed = sum(min(want, equal) for want in wanted)
    shares = []
    for want in wanted:
        owed -= min(want, equal)
        shares.append(min(want, budget - owed))
        budget -= shares[-1]
    return shares
