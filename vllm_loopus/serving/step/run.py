"""Engine steps of looped models: passes over rows at mixed depths, then the decoder.

Plain control flow over an executor that does the computing. The property tests use a fake one.

A step reads the pass that was launched ahead of it, runs passes until the quorum ends them, and
decodes the sequences that have exited. Where calls are asynchronous, `go_on` then launches the next
pass, so that the device computes while the host reads the tokens, books them and schedules.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.step.batches import next_batch, within
from vllm_loopus.serving.step.chunks import Chunks, Ints
from vllm_loopus.serving.step.clock import DeviceClock
from vllm_loopus.serving.step.guess_calls import GuessCalls
from vllm_loopus.serving.step.interface import DecoderReading, StepExecutor
from vllm_loopus.serving.step.quorum import Quorum
from vllm_loopus.serving.step.report import StepReport
from vllm_loopus.serving.step.staircase import UNKNOWN, Staircases
from vllm_loopus.serving.step.unread import Call, UnreadPasses
from vllm_loopus.serving.step.wave import Waves


class StepRunner:
    """Runs steps over the sequences of `stairs`.

    - `row_budget`: no pass and no decoder call has more rows. If more are needed, all sequences
      get an equal share, and the rest goes to those longest in flight, so that a long catch-up does
      not delay the next pass of others.
    - `asynchronous`: calls return before the device has computed them.
    - `overlap`: the next pass is launched (`go_on`) before the outcome of the step is used.
    - `late`: whether a pass may be launched before the exits of the one before are read; None to
      decide by cost. A row that has exited then goes through one more pass. Its K/V at that depth
      is a pure function of the tokens, so answers do not change. With `last_exited` only in chains
      (`go_on`), where the copies of its exit depth are written over it.
    - `waves`: positions that begin with guessed tokens; None without.
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
        waves: Waves | None = None,
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
        self._decoding: tuple[Chunks, DecoderReading, list[Call]] | None = None
        self._launched_ahead = False  # a pass, since the decoder call of the last step
        self.clock = DeviceClock(asynchronous)
        self._unread = UnreadPasses(
            stairs,
            executor,
            self.clock,
            lambda index, depth, exits: self.quorum.observe(stairs, index, depth, exits),
        )
        self.guesses = (
            None
            if waves is None
            else GuessCalls(
                waves, stairs, executor, self._unread, self.clock, row_budget, not overlap
            )
        )
        self.thrifty = False  # blocks are scarce: none is taken for a pass that may not come
        self._next: Any = None  # pass that has been prepared
        self._decoder: Any = None  # decoder call that has been prepared
        self._ahead: Chunks | None = None  # decoded before their exits are read
        self._ahead_reading: DecoderReading
        self._wanting = 0
        self._foresees = False
        self._encoder: Any = None  # encoder call that has been prepared
        self._rest: Chunks | None = None  # the next pass if nobody exits
        self._costs: StepCosts | None = None
        self.report = StepReport()

    def run(
        self,
        active: Ints,
        costs: StepCosts | None = None,
        foresees: bool = False,
        seconds: float | None = None,
    ) -> StepReport:
        """Refines the sequences `active` until the quorum ends the passes, then decodes.

        New positions have begun; together they have at most `row_budget` rows. A step has at most
        as many passes as there are depths, so waiting is bounded. A sequence without a block for
        its next plane waits for the next step. `settle_decoder` is to be called after it.

        `foresees`: if it is likely that the decoder follows the pass under way, it may be launched
        for all that may have exited, before their exits are read. `resolve` then reads them.
        `seconds`: what the last step took, if that is known.
        """
        exit_depths = self.report.exit_depths
        stairs, self.report = self.stairs, StepReport()
        self.clock.step()
        self._executor.trust(self._unread.oldest)
        if self.guesses is not None:
            self.guesses.begin_step(active, exit_depths, costs, seconds, self.thrifty)
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

    @property
    def _guessing(self) -> bool:
        """Whether a sequence of this step may guess."""
        return self.guesses is not None and self.guesses.active

    def _decode_ahead(self, active: Ints) -> bool:
        """Launches the decoder for all that may exit in the pass under way, if this is likely to be
        right. Its device time covers the host's way to the next pass."""
        stairs = self.stairs
        while len(self._unread.pending) > 1:  # of a chain, all but the last
            self._unread.read()
            self._unread.complete()
        if not self._unread.pending:
            return False
        possible = self._unread.possible(active)
        ready = int(np.count_nonzero(stairs.ready(possible)))
        wanting = stairs.in_flight[active] & stairs.wants_token[active]
        passing = possible[stairs.undecided(possible)]
        guesses = self.guesses if self._guessing else None
        if not (len(passing) or (guesses is not None and ready)):
            return False
        called = not ready and guesses is not None and guesses.due(active, possible)
        if not self.quorum.foresees(ready, stairs, passing, called):
            return False
        if guesses is not None:
            if (stairs.scored[possible] & stairs.prefilling(possible)).any():
                return False  # scored where it exits, and that is not known yet
            batch = self._eldest_first(stairs, possible)
            if batch.rows > self._budget:
                return False
            self.clock.decoder()
            self._ahead_reading = guesses.decode_with(active, batch, self.report, True)
        else:
            self._prepare(active, 0)
            if (prepared := self._decoder) is None:
                return False
            batch = prepared.chunks
            self.clock.decoder()
            self._ahead_reading = self._executor.decode(batch, None, prepared)
        self._ahead = batch
        self.report.decoder_rows = batch.rows
        self._wanting = int(np.count_nonzero(wanting))
        return True

    def resolve(self) -> Ints:
        """Reads which sequences have exited, if the decoder was launched before. Returns those that
        have a token."""
        stairs, report, batch = self.stairs, self.report, self._ahead
        if batch is None:
            return report.emitted
        self._ahead = None
        self._unread.read()
        used = stairs.ready(batch.sequence)
        report.emitted = batch.sequence[used & batch.newest]
        report.exit_depths = stairs.exit_depth[report.emitted]
        report.ready, report.wanting = len(report.emitted), self._wanting
        decoded = batch[used] if stairs.last_exited else batch
        stairs.advance_decoder(decoded)
        self._decoding = decoded, self._ahead_reading, self._unread.take_covered()
        if self.guesses is not None:
            self.guesses.waves.drop(report.emitted)
        stairs.finish(report.emitted)
        return report.emitted

    def _refine(self, active: Ints, most: int) -> None:
        """Runs passes until the quorum ends them or nothing is left to refine."""
        report = self.report
        while self._late is not True and len(self._unread.pending) > 1:  # of a chain
            self._unread.read()
        ahead, self._launched_ahead = self._launched_ahead, False
        while True:
            if ahead and self._guessing and not self._unread.pending and self._ends(active):
                return
            ahead = False
            if not self._unread.pending:
                if not self._launch(active, most - len(report.passes)):
                    return
                report.waiting += report.ready
            late = len(self._unread.pending) == 1 and self._is_late(active)
            if late and self._launch(active, most - len(report.passes)):
                report.waiting += report.ready
            if self._unread.pending:
                if self.overlap:
                    self._prepare(active, most - len(report.passes))
                    if self.guesses is not None:
                        self.guesses.decode(active, report)  # while exits are on their way
                self._unread.read()
            if self._ends(active):
                return
            if self.guesses is not None:
                self.guesses.decode(active, self.report)
            if (batch := self._next) is not None:
                # Those that have exited take part in it: rows are cheaper than another preparation.
                self._launch_batch(batch.chunks, 1, batch)
                report.waiting += report.ready

    def _prepare(self, active: Ints, left: int) -> None:
        """While the device runs a pass: prepares what may follow when its exits are known. That is
        the decoder, for all that may have exited, and the next pass, in which nobody has."""
        stairs = self.stairs
        self._next = self._decoder = self._rest = self._encoder = None
        if len(self._unread.pending) > 1 or self._guessing:
            return
        possible = self._unread.possible(active)
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

    @staticmethod
    def _eldest_first(stairs: Staircases, sequences: Ints) -> Chunks:
        """What the decoder has to compute if `sequences` exit where they are."""
        return stairs.chunks_to_decode(sequences[np.argsort(-stairs.age[sequences], kind="stable")])

    def _is_late(self, active: Ints) -> bool:
        """Whether the next pass is launched before the exits of the last one are read.

        That spares the host's way from reading to launching, and keeps those that have exited from
        the decoder for one more pass.
        """
        if self.stairs.last_exited or self._guessing:
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
            self._unread.read_all()
            if stairs.last_exited:  # no pass over what has exited: its copies have been written
                batch, prepared = batch[~stairs.refined(batch.sequence)], None
                if not len(batch):
                    return
        if passes > 1 and stairs.last_exited:
            self._unread.complete()
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

        slot = stairs.slot_of(batch)

        def decides() -> Ints:
            nonlocal certain, deciding
            asked = batch.newest & stairs.undecided(index, slot)
            known = stairs.predetermined_at(index, batch.depth, slot)
            open_ = known == UNKNOWN
            if stairs.last_exited:  # an exit that is certain is one to be copied
                open_ |= (known == 1) & (batch.depth < stairs.max_depth[index])
            if self._unread.pending:  # it may have exited in a pass that has not been read
                open_ |= known == 1
            certain = np.flatnonzero(asked & ~open_ & (known == 1))
            deciding = np.flatnonzero(asked & open_)
            return deciding

        self.clock.launch(idle=not self._unread.pending and self._decoding is None)
        reading = self._executor.run_passes(batch, passes, decides, prepared)
        timed = report.times.add(passes, self.clock.launched())
        stairs.advance(batch, passes)
        self._unread.complete()
        if len(certain):
            every = np.ones(len(certain), dtype=bool)
            stairs.decide(index[certain], batch.depth[certain], every, slot[certain])
        self._unread.add(batch, passes, deciding, reading, timed)
        report.catch_up_rows += passes * stairs.catch_up(batch)
        report.guess_rows += int(np.count_nonzero(slot))
        report.passes += [batch.rows] * passes

    def _next_batch(self, active: Ints) -> tuple[Chunks, bool]:
        batch, complete = next_batch(self.stairs, self._executor, active, self._budget, self.report)
        if self.guesses is None or not self.guesses.active:
            return batch, complete
        return self.guesses.with_guesses(active, batch), False

    def _decode(self, active: Ints) -> None:
        """Decodes the sequences that have exited, as far as the row budget goes."""
        stairs, report = self.stairs, self.report
        ready = active[stairs.ready(active)]
        if not len(ready):
            self._unread.complete()
            if not self._unread.pending:
                self._unread.check()
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
            batch = within(self._eldest_first(stairs, ready), self._budget)
            ready = batch.sequence[batch.newest]
            self.clock.decoder()
            if self.guesses is None:
                reading = self._executor.decode(batch)
            else:
                reading = self.guesses.decode_with(active, batch, report)
        self._unread.complete()
        self._decoder = self._next = None
        report.decoder_rows = batch.rows
        stairs.advance_decoder(batch)
        report.emitted, report.exit_depths = ready, stairs.exit_depth[ready]
        self._decoding = batch, reading, self._unread.take_covered()
        stairs.finish(report.emitted)

    def settle_decoder(self) -> Chunks:
        """Reads whether what was decoded is finite: sequences for which it is not have failed and
        have no token. Returns the chunks of the others."""
        self._unread.complete()
        decoded, reading = [], None
        if self._decoding is not None:
            (batch, reading, covers), self._decoding = self._decoding, None
            with self.clock.waiting():
                reading.wait()
            self._unread.cover(covers)
            failed = self.stairs.failed[self.report.emitted]
            self.report.emitted = self.report.emitted[~failed]
            self.report.exit_depths = self.report.exit_depths[~failed]
            decoded.append(batch)
        if self.guesses is not None:
            decoded += self.guesses.read(reading)
        batch = Chunks.join(decoded)
        return batch[~self.stairs.failed[batch.sequence]]

    def unread(self, index: int) -> int:
        """The newest call over a sequence that has not been read; 0 if there is none."""
        return self._unread.over(index)

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
        self._launched_ahead = True
        if batch is not None:
            self._launch_batch(batch, 1)
        elif not self._launch(active, most):
            return
        if (
            self._foresees
            and self._late is None
            and not (self.thrifty or self._guessing)
            and self._executor.may_chain()
        ):
            stairs = self.stairs
            running = active[stairs.undecided(active)]
            for _ in range(1, self.quorum.chain(stairs, running)):
                if not self._unread.pending or not self._launch(active, most):
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
