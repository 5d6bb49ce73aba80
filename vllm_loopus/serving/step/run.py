"""Engine steps of looped models: passes over rows at mixed depths, then the decoder.

Plain control flow over an executor that does the computing. The property tests use a fake one.

A step reads the pass that was launched ahead of it, runs passes until the quorum ends them, and
decodes the sequences that have exited. Where calls are asynchronous, `go_on` then launches the next
pass, so that the device computes while the host reads the tokens, books them and schedules.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.messages.progress import PassTimes
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints, shares
from vllm_loopus.serving.step.clock import DeviceClock
from vllm_loopus.serving.step.quorum import Quorum
from vllm_loopus.serving.step.staircase import UNKNOWN, Staircases


class Reading(Protocol):
    """Results on their way to the host."""

    def wait(self) -> Bools:
        """Whether the exit rule lets each deciding position exit. Sequences with a NaN or infinite
        state, in this call or in those since the last reading, have failed (`Staircases.fail`)."""
        ...

    def complete(self, leaving: Bools) -> None:
        """Launches what waits for the exits, before anything reads it. `leaving`: which of the
        deciding positions exit in this pass; others may have exited before."""
        ...


class StepExecutor(Protocol):
    """What a step needs computed. The chunks of one call may be at different depths.

    If a sequence `copies_on_exit`, the K/V and state of its newest row also go to all deeper depths
    when it exits, and the decoder's K/V to all depths at which a token may exit.
    """

    def make_room(self, chunks: Chunks) -> Ints:
        """How many positions of each chunk, from the first, have blocks [C]; takes new blocks."""
        ...

    def make_room_next(self, chunks: Chunks) -> Ints:
        """`make_room` for generated positions that have not begun."""
        ...

    def make_room_deeper(self, chunks: Chunks, passes: int) -> int:
        """How many of the next `passes` every chunk has blocks for; takes new blocks from the
        second pass on. The first pass is at the depths of the chunks, each later one a depth
        deeper."""
        ...

    def encode(self, chunks: Chunks, prepared: Any = None) -> None:
        """Runs the encoder over new positions and keeps `h^0` for the pass that follows.
        `prepared`: what `prepare_encoder` returned for these positions, and maybe others."""
        ...

    def prepare_encoder(self, chunks: Chunks) -> Any:
        """Prepares an encoder call over next positions, those of some of which will begin."""
        ...

    def prepare_pass(self, chunks: Chunks) -> Any:
        """Prepares a pass over `chunks` while the device runs another call."""
        ...

    def prepare_decoder(self, chunks: Chunks) -> Any:
        """Prepares a decoder call in the same way; None if that cannot be done."""
        ...

    def run_passes(
        self, chunks: Chunks, passes: int, decides: Callable[[], Ints], prepared: Any = None
    ) -> Reading | None:
        """Launches passes of the reasoning block over the same positions, one depth deeper each;
        `chunks` are at the depths of the last. In the first, chunks at depth 1 come first, as
        encoded. The exit rule is asked about the newest positions of the chunks that `decides`
        returns, after the last pass; no token exits earlier. None if there are none.
        `prepared`: what `prepare_pass` returned for the same chunks."""
        ...

    def decode(self, chunks: Chunks, used: Bools | None = None, prepared: Any = None) -> Reading:
        """Launches the decoder and keeps the hidden states of the newest positions of the chunks,
        of those `used` [C]. Nothing is decided by its reading. `prepared`: what `prepare_decoder`
        returned for the same chunks."""
        ...

    def check_states(self) -> Reading | None:
        """For passes that no reading covers yet; None if there are none."""
        ...

    def must_read(self) -> bool:
        """Whether blocks have been given out that passes which have not been read may have filled
        with NaN."""
        ...

    def trust(self) -> None:
        """All passes have been read."""
        ...


@dataclass
class StepReport:
    """What a step did.

    - `emitted`: sequences whose token can be sampled, and the `exit_depths` of these tokens.
    - `passes`: rows of each pass; `times`: how long each took.
    - `encoded_rows`: new positions. `catch_up_rows`: rows of passes for positions before those.
    - `wanting`: sequences that wanted a token when the passes ended; `ready`: those of them that
      had exited. `waiting`: sequences that had exited before a pass, summed over the passes.
    """

    emitted: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    exit_depths: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    passes: list[int] = field(default_factory=list)
    times: PassTimes = field(default_factory=PassTimes)
    encoded_rows: int = 0
    catch_up_rows: int = 0
    decoder_rows: int = 0
    waiting: int = 0
    ready: int = 0
    wanting: int = 0
    stalled: int = 0

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


_Call = tuple[Chunks, int, Ints]  # chunks, passes over them, life of their sequences


@dataclass
class _Launched:
    """Passes whose outcome has not been read.

    - `life`: of their sequences at the launch. `covers`: the calls whose states the reading checks.
    - `timed`: takes the seconds of the call.
    """

    chunks: Chunks
    deciding: Ints
    reading: Reading
    life: Ints
    covers: list[_Call]
    timed: Callable[[float], None]


class StepRunner:
    """Runs steps over the sequences of `stairs`.

    - `row_budget`: no pass and no decoder call has more rows. If more are needed, all sequences
      get an equal share, and the rest goes to those longest in flight, so that a long catch-up does
      not delay the next pass of others.
    - `asynchronous`: calls return before the device has computed them.
    - `overlap`: the next pass is launched (`go_on`) before the outcome of the step is used.
    - `late`: whether a pass may be launched before the exits of the one before are read; None to
      decide by cost. A row that has exited then goes through one more pass. Its K/V at that depth
      is a pure function of the tokens, so answers do not change. Not for `last_exited`.
    """

    def __init__(
        self,
        stairs: Staircases,
        executor: StepExecutor,
        quorum: Quorum,
        row_budget: int,
        asynchronous: bool = False,
        overlap: bool = False,
        late: bool | None = None,
    ) -> None:
        self.stairs = stairs
        self.quorum = quorum
        self.overlap = overlap
        self._executor = executor
        self._budget = row_budget
        self._late = late
        # The next positions, at depth 1, of those of the given sequences that go on by themselves
        # once their tokens are known.
        self.successors: Callable[[Ints], Chunks] = lambda sequences: Chunks.none()
        self._pending: list[_Launched] = []
        self._uncovered: list[_Call] = []  # passes that no reading covers
        self._decoding: tuple[Chunks, Reading, list[_Call]] | None = None
        self.clock = DeviceClock(asynchronous)
        self.thrifty = False  # blocks are scarce: none is taken for a pass that may not come
        self._next: Any = None  # pass that has been prepared
        self._decoder: Any = None  # decoder call that has been prepared
        self._afterwards: list[tuple[_Launched, Ints, Ints, Bools, Bools]] = []
        self._ahead: Chunks | None = None  # decoded before their exits are read
        self._ahead_reading: Reading
        self._wanting = 0
        self._foresees = False
        self._encoder: Any = None  # encoder call that has been prepared
        self._rest: Chunks | None = None  # the next pass if nobody exits
        self._costs: StepCosts | None = None
        self.report = StepReport()

    def run(
        self, active: Ints, costs: StepCosts | None = None, foresees: bool = False
    ) -> StepReport:
        """Refines the sequences `active` until the quorum ends the passes, then decodes.

        New positions have begun; together they have at most `row_budget` rows. A step has at most
        as many passes as there are depths, so waiting is bounded. A sequence without a block for
        its next plane waits for the next step. `settle_decoder` is to be called after it.

        `foresees`: if it is likely that the decoder follows the pass under way, it may be launched
        for all that may have exited, before their exits are read. `resolve` then reads them.
        """
        stairs, self.report = self.stairs, StepReport()
        self.clock.step()
        if not self._pending and not self._uncovered:
            self._executor.trust()
        self._foresees = foresees and self._late is not True
        self.quorum.begin_step(costs)
        self._costs = costs or self._costs
        stairs.stalled[active] = False
        most = int(stairs.max_depth[active].max()) if len(active) else 0
        if not (self._foresees and self._decode_ahead(active)):
            self._refine(active, most)
            self._decode(active)
        finished = active[stairs.refined(active) & ~stairs.wants_token[active]]
        stairs.finish(finished)
        stairs.age[active] += 1
        return self.report

    def _decode_ahead(self, active: Ints) -> bool:
        """Launches the decoder for all that may exit in the pass under way, if this is likely to be
        right. Its device time covers the host's way to the next pass."""
        stairs = self.stairs
        while len(self._pending) > 1:  # of a chain, all but the last
            self._settle(self._pending.pop(0))
            self._catch_up()
        if not self._pending:
            return False
        possible = self._possible(active)
        ready = int(np.count_nonzero(stairs.ready(possible)))
        wanting = stairs.in_flight[active] & stairs.wants_token[active]
        passing = possible[stairs.undecided(possible)]
        if not len(passing) or not self.quorum.foresees(ready, stairs, passing):
            return False
        self._prepare(active, 0)
        if (prepared := self._decoder) is None:
            return False
        self._ahead = prepared.chunks
        self.clock.decoder()
        self._ahead_reading = self._executor.decode(prepared.chunks, None, prepared)
        self.report.decoder_rows = prepared.chunks.rows
        self._wanting = int(np.count_nonzero(wanting))
        return True

    def resolve(self) -> Ints:
        """Reads which sequences have exited, if the decoder was launched before. Returns those that
        have a token."""
        stairs, report, batch = self.stairs, self.report, self._ahead
        if batch is None:
            return report.emitted
        self._ahead = None
        self._settle(self._pending.pop(0))
        used = stairs.ready(batch.sequence)
        report.emitted = batch.sequence[used & batch.newest]
        report.exit_depths = stairs.exit_depth[report.emitted]
        report.ready, report.wanting = len(report.emitted), self._wanting
        decoded = batch[used] if stairs.last_exited else batch
        stairs.advance_decoder(decoded)
        covers, self._uncovered = self._uncovered, []
        self._decoding = decoded, self._ahead_reading, covers
        stairs.finish(report.emitted)
        return report.emitted

    def _refine(self, active: Ints, most: int) -> None:
        """Runs passes until the quorum ends them or nothing is left to refine."""
        report = self.report
        while True:
            if not self._pending:
                if not self._launch(active, most - len(report.passes)):
                    return
                report.waiting += report.ready
            if len(self._pending) == 1 and self._is_late(active):
                report.waiting += report.ready * self._launch(active, most - len(report.passes))
            if self._pending:
                if self.overlap:
                    self._prepare(active, most - len(report.passes))
                self._settle(self._pending.pop(0))
            if self._ends(active):
                return
            if (batch := self._next) is not None:
                # Those that have exited take part in it: rows are cheaper than another preparation.
                self._launch_batch(batch.chunks, 1, batch)
                report.waiting += report.ready

    def _prepare(self, active: Ints, left: int) -> None:
        """While the device runs a pass: prepares what may follow when its exits are known. That is
        the decoder, for all that may have exited, and the next pass, in which nobody has."""
        stairs = self.stairs
        self._next = self._decoder = self._rest = self._encoder = None
        if len(self._pending) > 1:
            return
        possible = self._possible(active)
        if len(possible):
            chunks = self._eldest_first(stairs, possible)
            if chunks.rows <= self._budget:
                self._decoder = self._executor.prepare_decoder(chunks)
        if self.thrifty:
            return
        if len(possible) and len(beginning := self.successors(possible)):
            rooms = self._executor.make_room_next(beginning)
            beginning = beginning[rooms > 0]
            if len(beginning) and beginning.rows <= self._budget:
                self._encoder = self._executor.prepare_encoder(beginning)
        batch, complete = self._next_batch(active)
        if not len(batch) or np.count_nonzero(batch.depth == 1) or not batch.newest.all():
            return
        if complete:
            self._rest = batch
        if left > 0 and not stairs.last_exited:
            self._next = self._executor.prepare_pass(batch)

    def _possible(self, active: Ints) -> Ints:
        """The sequences that have exited, or may in the pass under way; none if some of these have
        gone on to another pass."""
        stairs, (pending,) = self.stairs, self._pending
        deciding = pending.chunks.sequence[pending.deciding]
        there = pending.life[pending.deciding] == stairs.life[deciding]
        there &= pending.chunks.end[pending.deciding] == stairs.done[deciding, 0]
        mask = np.zeros(stairs.capacity, dtype=bool)
        mask[deciding] = there
        possible = active[(mask[active] & stairs.undecided(active)) | stairs.ready(active)]
        at = pending.chunks.depth[pending.deciding]
        further = mask[deciding] & stairs.undecided(deciding) & (stairs.depth[deciding] != at)
        return possible[:0] if np.count_nonzero(further) else possible

    @staticmethod
    def _eldest_first(stairs: Staircases, sequences: Ints) -> Chunks:
        """What the decoder has to compute if `sequences` exit where they are."""
        return stairs.chunks_to_decode(sequences[np.argsort(-stairs.age[sequences], kind="stable")])

    def _is_late(self, active: Ints) -> bool:
        """Whether the next pass is launched before the exits of the last one are read.

        That spares the host's way from reading to launching, and keeps those that have exited from
        the decoder for one more pass.
        """
        if self.stairs.last_exited:
            return False
        if self._late is not None or self._costs is None or not self.overlap:
            return bool(self._late)  # by default only where it can gain anything
        stairs = self.stairs
        running = active[stairs.in_flight[active] & stairs.wants_token[active]]
        if not len(running):
            return False
        expected = self.quorum.exits_expected(stairs, running) / len(running)
        return expected * self._costs.per_pass < self._costs.gap

    def _ends(self, active: Ints) -> bool:
        """Whether the passes end now."""
        stairs, report = self.stairs, self.report
        wanting = active[stairs.wants_token[active] & stairs.in_flight[active]]
        ready = stairs.ready(wanting)
        running = wanting[~ready & ~stairs.stalled[wanting]]
        report.ready = int(ready.sum())
        report.wanting = report.ready + len(running)
        return report.ready > 0 and self.quorum.ends(report.ready, stairs, running)

    def _launch(self, active: Ints, most: int) -> bool:
        """Launches a pass over all sequences that have something to refine and get blocks, and, up
        to `most` in all, the passes after it that decide nothing. False if nothing is left."""
        stairs = self.stairs
        batch, complete = self._next_batch(active) if most > 0 else (Chunks.none(), True)
        if not len(batch):
            return False
        passes = 1
        if complete and most > 1 and not stairs.ready(active).any():
            passes = stairs.passes_ahead(batch, most)
        if passes > 1:
            passes = self._executor.make_room_deeper(batch, passes)
        self._launch_batch(batch, passes)
        return True

    def _launch_batch(self, batch: Chunks, passes: int, prepared: Any = None) -> None:
        """Launches passes over `batch`, which is at the depths of the first."""
        stairs, report = self.stairs, self.report
        if self._executor.must_read():
            self._read_all()
        self._next = self._decoder = self._rest = None
        fresh = batch.depth == 1
        if fresh.any():
            new = batch[fresh].at(0)
            report.encoded_rows += new.rows
            self._executor.encode(new, self._encoder)
            self._encoder = None
        batch = batch.deeper(passes - 1)
        index = batch.sequence
        certain = deciding = np.zeros(0, dtype=np.int64)

        def decides() -> Ints:
            nonlocal certain, deciding
            asked = batch.newest & stairs.undecided(index)
            known = stairs.predetermined_at(index, batch.depth)
            open_ = known == UNKNOWN
            if stairs.last_exited:  # an exit that is certain is one to be copied
                open_ |= (known == 1) & (batch.depth < stairs.max_depth[index])
            if self._pending:  # it may have exited in a pass that has not been read
                open_ |= known == 1
            certain = np.flatnonzero(asked & ~open_ & (known == 1))
            deciding = np.flatnonzero(asked & open_)
            return deciding

        self.clock.launch(idle=not self._pending and self._decoding is None)
        reading = self._executor.run_passes(batch, passes, decides, prepared)
        timed = report.times.add(passes, self.clock.launched())
        stairs.advance(batch, passes)
        self._catch_up()
        if len(certain):
            at = index[certain]
            stairs.decide(at, batch.depth[certain], np.ones(len(at), dtype=bool))
        self._uncovered.append((batch, passes, stairs.life[index]))
        report.catch_up_rows += passes * stairs.catch_up(batch)
        report.passes += [batch.rows] * passes
        if reading is not None:
            covers, self._uncovered = self._uncovered, []
            life = stairs.life[index]
            self._pending.append(_Launched(batch, deciding, reading, life, covers, timed))

    def unread(self, index: int) -> bool:
        """Whether the outcome of a pass over a sequence has not been read."""
        calls = [*self._uncovered, *(call for one in self._pending for call in one.covers)]
        return any(np.count_nonzero(chunks.sequence == index) for chunks, *_ in calls)

    def _read_all(self) -> None:
        """Reads all passes, before anything uses blocks that they may have filled with NaN."""
        while self._pending:
            self._settle(self._pending.pop(0))
        if (reading := self._executor.check_states()) is not None:
            reading.wait()
            covers, self._uncovered = self._uncovered, []
            self._cover(covers)
        self._catch_up()
        self._executor.trust()

    def _settle(self, launched: _Launched) -> None:
        """Reads the outcome of passes."""
        stairs, chunks, deciding = self.stairs, launched.chunks, launched.deciding
        with self.clock.waiting() as seconds:
            exits = launched.reading.wait()
        if seconds:
            launched.timed(seconds[0])
        index, depth = chunks.sequence[deciding], chunks.depth[deciding]
        # Not those that were removed since, or went on to another position, or had exited before.
        valid = (launched.life[deciding] == stairs.life[index]) & stairs.undecided(index)
        valid &= chunks.end[deciding] == stairs.done[index, 0]
        index, depth = index[valid], depth[valid]
        leaving = np.zeros(len(deciding), dtype=bool)
        leaving[valid] = stairs.decide(index, depth, exits[valid])
        self._afterwards.append((launched, index, depth, leaving, leaving[valid]))

    def _catch_up(self) -> None:
        """What the next launch does not depend on, once it is launched."""
        for launched, index, depth, leaving, exits in self._afterwards:
            launched.reading.complete(leaving)
            self._cover(launched.covers)
            self.quorum.observe(self.stairs, index, depth, exits)
        self._afterwards.clear()

    def _cover(self, covers: list[_Call]) -> None:
        """The passes are over, and the states of sequences that have not failed are finite."""
        for chunks, passes, life in covers:
            index = chunks.sequence
            there = (life == self.stairs.life[index]) & ~self.stairs.failed[index]
            self.stairs.settle(chunks if there.all() else chunks[there], passes)

    def _next_batch(self, active: Ints) -> tuple[Chunks, bool]:
        """What the next pass computes, and whether that is all that is wanted.

        New positions come first and are never deferred, because `h^0` is not stored.
        """
        stairs = self.stairs
        wanted = stairs.next_chunks(active[np.argsort(-stairs.age[active], kind="stable")])
        if not len(wanted):
            return wanted, True
        new = wanted.depth == 1
        fresh = wanted[new]
        budget = self._budget - fresh.rows
        assert budget >= 0, "new positions exceed the row budget"
        if len(fresh):
            room = self._executor.make_room(fresh)
            assert (room == fresh.sizes).all(), "blocks of new positions are promised"
            if len(fresh) == len(wanted):
                return fresh, True
        deeper = wanted[~new] if len(fresh) else wanted
        granted = self._within(deeper, budget)
        room = self._executor.make_room(granted) if len(granted) else granted.sizes
        short = room < granted.sizes
        if short.any():
            # What comes after a chunk that is cut attends to all of it.
            behind = np.zeros(len(granted), dtype=bool)
            behind[1:] = (granted.sequence[1:] == granted.sequence[:-1]) & short[:-1]
            room, short = np.where(behind, 0, room), short | behind
            self.report.stalled += int(short.sum())
        stairs.stalled[granted.sequence] = short
        batch = Chunks.join([fresh, granted.cut(room)])
        return batch, batch.rows == wanted.rows

    def _within(self, chunks: Chunks, budget: int) -> Chunks:
        """Of chunks, the first rows of each sequence, up to its share of `budget`."""
        sizes = chunks.sizes
        if int(sizes.sum()) <= budget:
            return chunks
        first = np.ones(len(chunks), dtype=bool)
        first[1:] = chunks.sequence[1:] != chunks.sequence[:-1]
        owner = np.cumsum(first) - 1
        wanted = np.bincount(owner, weights=sizes).astype(np.int64)
        share = shares(wanted, budget)[owner]
        before = np.cumsum(sizes) - sizes
        before -= before[first][owner]  # rows of the sequence before this chunk
        return chunks.cut(np.clip(share - before, 0, sizes))

    def _decode(self, active: Ints) -> None:
        """Decodes the sequences that have exited, as far as the row budget goes."""
        stairs, report = self.stairs, self.report
        ready = active[stairs.ready(active)]
        if not len(ready):
            self._catch_up()
            if not self._pending and (reading := self._executor.check_states()) is not None:
                reading.wait()
                covers, self._uncovered = self._uncovered, []
                self._cover(covers)
            return
        if (prepared := self._decoder) is not None:
            # Decoder K/V at the depth of a sequence that goes on is not in vain.
            batch, used = prepared.chunks, stairs.ready(prepared.chunks.sequence)
            self.clock.decoder()
            reading = self._executor.decode(batch, used, prepared)
            ready = batch.sequence[used & batch.newest]
            if stairs.last_exited:
                batch = batch[used]
        else:
            batch = self._within(self._eldest_first(stairs, ready), self._budget)
            self.clock.decoder()
            reading = self._executor.decode(batch)
            ready = batch.sequence[batch.newest]
        self._catch_up()
        self._decoder = self._next = None
        report.decoder_rows = batch.rows
        stairs.advance_decoder(batch)
        report.emitted, report.exit_depths = ready, stairs.exit_depth[ready]
        covers, self._uncovered = self._uncovered, []
        self._decoding = batch, reading, covers
        stairs.finish(report.emitted)

    def settle_decoder(self) -> Chunks:
        """Reads whether what was decoded is finite: sequences for which it is not have failed and
        have no token. Returns the chunks of the others."""
        self._catch_up()
        if self._decoding is None:
            return Chunks.none()
        (batch, reading, covers), self._decoding = self._decoding, None
        with self.clock.waiting():
            reading.wait()
        self._cover(covers)
        failed = self.stairs.failed[self.report.emitted]
        self.report.emitted = self.report.emitted[~failed]
        self.report.exit_depths = self.report.exit_depths[~failed]
        return batch[~self.stairs.failed[batch.sequence]]

    def may_begin(self) -> Ints | None:
        """Of which sequences the next positions are ready to begin; None if that is not known."""
        return None if self._encoder is None else self._encoder.chunks.sequence

    def go_on(self, active: Ints, begun: Chunks) -> None:
        """Launches the next pass over `active`, to be read in the next step. `begun`: the next
        positions after the tokens of this step.

        Where a pass is shorter than what the host does in a step, several passes are launched, and
        exits are read while the last of them runs.
        """
        most = int(self.stairs.max_depth[active].max()) if len(active) else 0
        rest, self._rest = self._rest, None
        batch = None
        if rest is not None and len(begun) and begun.rows + rest.rows <= self._budget:
            batch = self._with_the_rest(active, begun, rest)
        if batch is not None:
            self._launch_batch(batch, 1)
        elif not self._launch(active, most):
            return
        if self._foresees and self._late is None and not self.thrifty:
            stairs = self.stairs
            running = active[stairs.undecided(active)]
            for _ in range(1, self.quorum.chain(stairs, running)):
                if not self._pending or not self._launch(active, most):
                    return

    def _with_the_rest(self, active: Ints, begun: Chunks, rest: Chunks) -> Chunks | None:
        """The next positions, and those of `rest`, the pass that was expected if nobody exited,
        that have not. None if this is not all that there is to compute."""
        stairs = self.stairs
        fresh = begun.at(1)
        if self._encoder is None:
            room = self._executor.make_room(fresh)
            assert (room == fresh.sizes).all(), "blocks of new positions are promised"
        index = rest.sequence
        goes_on = stairs.in_flight[index] & (stairs.depth[index] + 1 == rest.depth)
        goes_on &= (stairs.target[index] >= rest.depth) & (stairs.done[index, 0] == rest.end)
        batch = Chunks.join([fresh, rest[goes_on]])
        waiting = stairs.in_flight[active] & (stairs.depth[active] < stairs.target[active])
        return batch if np.count_nonzero(waiting) == len(batch) else None
