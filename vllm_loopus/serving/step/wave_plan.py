"""How far sequences may guess: as given, or by what passes cost and how often guesses are right.

All ranks choose the same: costs and times come from the scheduler, and outcomes of guesses are
those of the tokens.
"""

from dataclasses import dataclass, field

import numpy as np

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.step.acceptance import Acceptance
from vllm_loopus.serving.step.chunks import Bools, Ints


class WavePlan:
    """As the engine option says.

    - `draft_depth`: passes before a guess. `lookahead`: guessed positions of a sequence.
    """

    def __init__(self, draft_depth: int, lookahead: int) -> None:
        self.draft_depth, self.lookahead = draft_depth, lookahead

    def begin_step(
        self,
        sequences: Ints,
        exit_depths: Ints,
        costs: StepCosts | None,
        seconds: float | None = None,
    ) -> None:
        """A step with `sequences` begins. `exit_depths`: of the tokens of the last one, which took
        `seconds`, if that is known. `costs`: as measured so far, None while unknown."""

    def allows(self, sequences: Ints) -> Bools:
        """Which of `sequences` may guess."""
        return np.ones(len(sequences), dtype=bool)

    def observe(self, sequences: Ints, depth: Ints, right: bool) -> None:
        """Guesses of `sequences` at `depth` were all right, or all wrong."""

    def add(self, index: int) -> None:
        """A sequence gets the row `index`."""


@dataclass(frozen=True)
class Expected:
    """What n sequences are expected to take, for costs of a pass and a boundary.

    Without guesses, each gets a token in D passes and a boundary; D is the mean exit depth. With
    them, a sequence whose guesses are right with probability p gets 1 / (1 - p) tokens before it
    has to start again: the first after D passes, each other one after `draft_depth` more, or
    D' / (lookahead + 1) if that is more. D' is a deep exit depth, since the tokens behind one that
    exits deep have to wait for it. Each pass has the rows of all that is in flight. There is
    a boundary for each token; before the first one, guesses are decoded alone.
    """

    ALONE = 0.5  # of a boundary: a decoder call without sampling and scheduling

    costs: StepCosts
    count: int
    mean: float
    deep: float

    def plain(self) -> float:
        """Without guesses: tokens of a sequence a second."""
        one = self.costs.per_pass + self.costs.per_row * self.count
        return 1 / (self.mean * one + self.costs.per_boundary)

    def guessing(self, draft_depth: int, lookahead: int, acceptance: float) -> float:
        """With guesses: tokens of a sequence a second."""
        tokens = 1 / (1 - acceptance)
        each = max(draft_depth, self.deep / (lookahead + 1))
        passes = self.mean + (tokens - 1) * each
        rows = self.count * max(self.mean / each, 1.0)
        seconds = passes * (self.costs.per_pass + self.costs.per_row * rows)
        boundaries = tokens + self.ALONE * (self.mean / each - 1)
        return tokens / (seconds + boundaries * self.costs.per_boundary)

    def break_even(self, draft_depth: int, lookahead: int) -> float:
        """The acceptance from which on guesses are no slower."""
        low, high = 0.0, Acceptance.MOST
        for _ in range(7):
            middle = (low + high) / 2
            if self.guessing(draft_depth, lookahead, middle) < self.plain():
                low = middle
            else:
                high = middle
        return high


@dataclass
class _Rate:
    """Tokens of a sequence a second, recent ones mostly."""

    MEMORY = 0.97
    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens = self.MEMORY * self.tokens + tokens
        self.seconds = self.MEMORY * self.seconds + seconds
        self.steps += 1

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class _Measured:
    """Of steps with about as many sequences: rates without and with guesses."""

    off: _Rate = field(default_factory=_Rate)
    on: _Rate = field(default_factory=_Rate)
    rests: int = 0  # steps that are still to come without guesses
    rest: int = 0  # how many there were last time


class AutoPlan(WavePlan):
    """Guesses where that is expected to be faster, as far ahead as is best (`Expected`), unless it
    turns out to be slower: measured rates have the last word."""

    GAIN = 1.05  # how much faster guesses have to be expected
    FIRST, TRIAL = 8, 32  # steps without and with guesses before their rates are compared
    REST, LONGEST = 256, 8192  # steps without guesses after they were slower; doubles
    STALE = 4096  # steps with guesses after which the rate without is measured again
    RECENT = 0.95
    DEEP = 1.3  # standard deviations above the mean exit depth: one token in ten exits deeper
    DEPTHS = 4

    def __init__(self, max_loops: int, lookahead: int) -> None:
        """`lookahead`: the most positions of a sequence that may be guessed."""
        super().__init__(1, 0)
        self._depths = range(1, max(min(self.DEPTHS, max_loops - 1), 1) + 1)
        self._choices = sorted({min(ahead, lookahead) for ahead in (1, 2, 3, 5, 7, lookahead)})
        self._acceptance = Acceptance(max_loops)
        self._mean = 0.0  # exit depth; 0 before a token
        self._squares = 0.0  # of exit depths, their mean
        self._needed = 1.0  # acceptance
        self._measured: dict[int, _Measured] = {}  # by the power of two of the sequences
        self._before = 0  # sequences in the last step

    def add(self, index: int) -> None:
        self._acceptance.add(index)

    def observe(self, sequences: Ints, depth: Ints, right: bool) -> None:
        self._acceptance.observe(sequences, depth, right)

    def allows(self, sequences: Ints) -> Bools:
        if not self.lookahead:
            return np.zeros(len(sequences), dtype=bool)
        return self._acceptance.of(sequences, self.draft_depth) >= self._needed

    def begin_step(
        self,
        sequences: Ints,
        exit_depths: Ints,
        costs: StepCosts | None,
        seconds: float | None = None,
    ) -> None:
        if len(exit_depths):
            new = 1 - self.RECENT if self._mean else 1
            self._mean += new * (float(exit_depths.mean()) - self._mean)
            self._squares += new * (float((exit_depths**2).mean()) - self._squares)
        self._acceptance.forget(self.draft_depth if self.lookahead else None)
        before, self._before = self._before, len(sequences)
        if before and seconds is not None and before == len(sequences):
            measured = self._of(before)
            rate = measured.on if self.lookahead else measured.off
            rate.add(len(exit_depths) / before, seconds)
        self.lookahead = 0
        if self._mean <= 1 or not len(sequences):
            return
        measured = self._of(len(sequences))
        if self._may(measured):
            self._choose(costs or self._supposed(measured), len(sequences))

    def _of(self, count: int) -> _Measured:
        return self._measured.setdefault(count.bit_length(), _Measured())

    def _may(self, measured: _Measured) -> bool:
        """Whether guesses are not known to be slower now."""
        if measured.off.steps < self.FIRST:
            return False
        if measured.rests:
            measured.rests -= 1
            return False
        if measured.on.steps > self.STALE:
            measured.on, measured.off = _Rate(), _Rate()
            return False
        if measured.on.steps >= self.TRIAL and measured.on.value < measured.off.value:
            measured.rest = min(2 * measured.rest or self.REST, self.LONGEST)
            measured.rests, measured.on = measured.rest, _Rate()
            return False
        return True

    def _supposed(self, measured: _Measured) -> StepCosts:
        """Costs where no pass could be timed: a boundary is taken to be a bit of a pass."""
        each = 1 / (measured.off.value * (self._mean + 0.4)) if measured.off.value else 1.0
        return StepCosts(per_pass=each, per_boundary=0.4 * each)

    def _choose(self, costs: StepCosts, count: int) -> None:
        spread = max(self._squares - self._mean**2, 0.0) ** 0.5
        expected = Expected(costs, count, self._mean, self._mean + self.DEEP * spread)
        best = self.GAIN * expected.plain()
        for depth in self._depths:
            acceptance = self._acceptance.at(depth)
            for ahead in self._choices:
                rate = expected.guessing(depth, ahead, acceptance)
                if rate > best:
                    best, self.draft_depth, self.lookahead = rate, depth, ahead
        if self.lookahead:
            self._needed = expected.break_even(self.draft_depth, self.lookahead)
