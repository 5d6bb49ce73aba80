"""Guesses of a step: rows of passes for guessed positions, and decoder calls that guess."""

from collections.abc import Callable

import numpy as np

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.step.chunks import Chunks, Ints
from vllm_loopus.serving.step.clock import DeviceClock
from vllm_loopus.serving.step.further import FurtherTokens
from vllm_loopus.serving.step.interface import DecoderReading, StepExecutor
from vllm_loopus.serving.step.quorum import Quorum
from vllm_loopus.serving.step.report import StepReport
from vllm_loopus.serving.step.staircase import UNKNOWN, Staircases
from vllm_loopus.serving.step.unread import Call, UnreadPasses
from vllm_loopus.serving.step.wave import Waves, undecoded


class GuessCalls:
    """What `StepRunner` does for guessed positions.

    - `waiting`: guesses are read at once, because calls compute before they return.
    - `active`: whether a sequence of this step may guess.
    """

    def __init__(
        self,
        waves: Waves,
        stairs: Staircases,
        executor: StepExecutor,
        unread: UnreadPasses,
        clock: DeviceClock,
        row_budget: int,
        waiting: bool,
    ) -> None:
        self.waves = waves
        self.further = FurtherTokens(stairs)
        self.active = False
        # How many positions after the newest certain ones may begin [S].
        self.room_ahead: Callable[[Ints], Ints] = np.zeros_like
        self._stairs = stairs
        self._executor = executor
        self._unread = unread
        self._clock = clock
        self._budget = row_budget
        self._waiting = waiting
        self._thrifty = False
        # Chunks whose guesses are on their way, with the life of their sequences: in the decoder
        # call of the step, and in calls of their own.
        self._with_tokens: tuple[tuple[Chunks, Ints], Chunks] | None = None
        self._alone: list[tuple[tuple[Chunks, Ints], DecoderReading, list[Call]]] = []
        self._decoded: list[Chunks] = []  # read since `take_decoded`, of calls of their own

    def begin_step(
        self,
        sequences: Ints,
        exit_depths: Ints,
        costs: StepCosts | None,
        seconds: float | None,
        thrifty: bool,
    ) -> None:
        """See `WavePlan.begin_step`. `thrifty`: blocks are scarce, so that guesses take none."""
        stairs, self._thrifty = self._stairs, thrifty
        exit_depths = np.concatenate([exit_depths, self.further.take_given()])
        wanting = sequences[stairs.in_flight[sequences] & stairs.wants_token[sequences]]
        self.waves.plan.begin_step(wanting, exit_depths, costs, seconds)
        self.active = self.waves.guessing(sequences)

    def with_guesses(self, active: Ints, batch: Chunks) -> Chunks:
        """`batch`, and what it leaves rows and blocks for of guessed positions."""
        chunks = self.waves.next_chunks(active)
        if self._thrifty or not len(chunks):
            return batch
        chunks = chunks[np.cumsum(chunks.sizes) <= self._budget - batch.rows]
        if not len(chunks):
            return batch
        chunks = chunks[self._executor.make_room(chunks) == chunks.sizes]
        fresh, new = batch.depth == 1, chunks.depth == 1
        return Chunks.join([batch[fresh], chunks[new], batch[~fresh], chunks[~new]])

    def _to_decode(self, active: Ints, rows: int, leaving: Ints | None = None) -> Chunks:
        """What the decoder computes for guesses, in at most so many `rows`. `leaving`: sequences
        whose tokens are decoded in the same call."""
        if not self.active or self._thrifty:
            return Chunks.none()
        leaves = np.zeros(self._stairs.capacity, dtype=bool)
        if leaving is not None:
            leaves[leaving] = True
        chunks = self.waves.to_decode(active, self.room_ahead(active), leaves[active])
        return chunks[np.cumsum(chunks.sizes) <= rows]

    def due(self, active: Ints, leaving: Ints) -> bool:
        """Whether the decoder has guesses to compute now, if `leaving` may have exited."""
        return len(self._to_decode(active, self._budget, leaving)) > 0

    def decode(self, active: Ints, report: StepReport) -> None:
        """Decodes positions that are deep enough for a guess; the next ones begin with it."""
        chunks = self._to_decode(active, self._budget)
        if not len(chunks):
            return
        self._clock.decoder()
        reading = self._executor.decode(chunks, guessing=chunks.newest)
        self._unread.complete()
        self._stairs.advance_decoder(chunks)
        report.guess_decoder_rows += chunks.rows
        self._alone.append((self._begun(chunks), reading, self._unread.take_covered()))
        if self._waiting:
            self._read_alone()

    def decode_with(
        self, active: Ints, batch: Chunks, report: StepReport, passing: bool = False
    ) -> DecoderReading:
        """Decodes `batch`, whose tokens are to be sampled, what has exited behind it, and what
        guesses now. `passing`: the exits of the pass under way are not known yet."""
        leaving, left = batch.sequence[batch.newest], self._budget - batch.rows
        guesses = self._to_decode(active, left, leaving)
        left -= guesses.rows
        self._stairs.advance_decoder(batch)
        parts = []
        for chunks in self.further.chunks(leaving, guesses.sequence, passing):
            behind = undecoded(chunks, self._stairs.decoded)
            if (left := left - behind.rows) < 0:
                break
            self._stairs.advance_decoder(behind)  # several of a sequence may be at one depth
            parts.append(behind)
        parts.append(undecoded(guesses, self._stairs.decoded))
        self._stairs.advance_decoder(parts[-1])
        behind = Chunks.join(parts)
        if not len(behind):
            return self._executor.decode(batch)
        both = Chunks.join([batch, behind])
        likely = np.arange(len(both)) >= len(batch)
        begins = np.arange(len(both)) >= len(both) - len(guesses)
        reading = self._executor.decode(both, guessing=likely, beginning=begins)
        self.further.expect(behind)
        report.guess_decoder_rows += behind.rows
        self._with_tokens = self._begun(parts[-1]), behind
        return reading

    def _begun(self, chunks: Chunks) -> tuple[Chunks, Ints]:
        """Begins the positions after `chunks`, whose guesses are to be read. Returns `chunks`, and
        the life of their sequences."""
        self.waves.begin(chunks)
        return chunks, self._stairs.life[chunks.sequence]

    def _read_alone(self) -> None:
        """Reads the guesses of decoder calls of their own."""
        guesses, self._alone = self._alone, []
        for (chunks, life), reading, covers in guesses:
            with self._clock.waiting():
                reading.wait()
            self._unread.cover(covers)
            self._decoded.append(chunks)
            self.waves.fill(chunks, life, reading.tokens())

    def read(self, reading: DecoderReading | None) -> list[Chunks]:
        """Reads what has not been read; `reading`: the decoder call of the step, for which the host
        has waited. Returns the chunks that were decoded for guesses."""
        self._read_alone()
        decoded, self._decoded = self._decoded, []
        if reading is not None and self._with_tokens is not None:
            (begun, life), behind = self._with_tokens
            tokens = reading.tokens()
            self.waves.fill(begun, life, tokens[len(behind) - len(begun) :])
            self.further.fill(tokens)
            decoded.append(behind)
            self._with_tokens = None
        return decoded

    def confirm(self, sequences: Ints, quorum: Quorum) -> None:
        """The first guesses of `sequences` are right. `quorum` learns what the exit rule said of
        them before."""
        self.waves.confirm(sequences)
        stairs = self._stairs
        for depth in range(1, int(stairs.depth[sequences].max(initial=0)) + 1):
            at = np.full_like(sequences, depth)
            asked = stairs.depth[sequences] >= depth
            asked &= stairs.predetermined_at(sequences, at) == UNKNOWN
            asked &= stairs.settled[sequences, depth] >= stairs.done[sequences, 0]  # not unread
            exits = stairs.exit_depth[sequences] == depth
            quorum.observe(stairs, sequences[asked], at[asked], exits[asked])
