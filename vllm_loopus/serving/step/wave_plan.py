"""How far sequences may guess: as given, or by what passes cost and how often guesses are right.

All ranks choose the same: costs come from the scheduler, and outcomes of guesses are those of the
tokens.
"""

from typing import Protocol

import numpy as np

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.step.chunks import Bools, Ints


class WavePlan(Protocol):
    """- `draft_depth`: passes before a guess. `lookahead`: guessed positions of a sequence."""

    draft_depth: int
    lookahead: int

    def begin_step(self, sequences: Ints, exit_depths: Ints, costs: StepCosts | None) -> None:
        """A step with `sequences` begins. `exit_depths`: of the tokens of the last one. `costs`: as
        measured so far, None while unknown."""
        ...

    def allows(self, sequences: Ints) -> Bools:
        """Which of `sequences` may guess."""
        ...

    def observe(self, sequences: Ints, depth: Ints, right: bool) -> None:
        """Guesses of `sequences` at `depth` were all right, or all wrong."""
        ...

    def add(self, index: int) -> None:
        """A sequence gets the row `index`."""
        ...


class FixedPlan:
    """As the engine option says."""

    def __init__(self, draft_depth: int, lookahead: int) -> None:
        self.draft_depth, self.lookahead = draft_depth, lookahead

    def begin_step(self, sequences: Ints, exit_depths: Ints, costs: StepCosts | None) -> None:
        pass

    def allows(self, sequences: Ints) -> Bools:
        return np.ones(len(sequences), dtype=bool)

    def observe(self, sequences: Ints, depth: Ints, right: bool) -> None:
        pass

    def add(self, index: int) -> None:
        pass


class AutoPlan:
    """Guesses where that is expected to be faster, as far ahead as is best.

    Without guesses, n sequences get a token each in D passes and a boundary; D is the mean exit
    depth. With them, a sequence whose guesses are right with probability p gets 1 / (1 - p) tokens
    before it has to start again: the first after D passes, each other one after `draft_depth`
    more, or D / (lookahead + 1) if that is more. Each pass has the rows of all that is in flight.
    Every `draft_depth` passes there is a boundary.
    """

    GAIN = 1.05  # how much faster guesses have to be expected
    HOPE, DOUBT = 0.8, 6.0  # what acceptance is taken for before it is seen, and its weight
    MEMORY = 0.99  # weight of the past after each outcome
    FORGETS = 0.999  # and after each step without guesses, so that they are tried again
    OWN = 8.0  # outcomes after which those of a sequence itself count as much as all others
    RECENT = 0.95

    def __init__(self, max_loops: int, lookahead: int) -> None:
        """`lookahead`: the most positions of a sequence that may be guessed."""
        self._depths = range(1, max(min(4, max_loops - 1), 1) + 1)
        self._choices = sorted({min(ahead, lookahead) for ahead in (1, 2, 3, 5, 7, lookahead)})
        self._right = np.zeros(max_loops + 1)
        self._wrong = np.zeros(max_loops + 1)
        self._own = np.zeros((2, 8))  # wrong and right, by row of the sequence
        self._mean = 0.0  # exit depth; 0 before a token
        self._needed = 1.0  # acceptance
        self.draft_depth, self.lookahead = 1, 0

    def add(self, index: int) -> None:
        if (more := index + 1 - self._own.shape[1]) > 0:
            self._own = np.pad(self._own, ((0, 0), (0, more + index)))
        self._own[:, index] = 0

    def observe(self, sequences: Ints, depth: Ints, right: bool) -> None:
        if not len(sequences):
            return
        counts = np.bincount(depth, minlength=len(self._right))
        keep = self.MEMORY**counts
        self._right, self._wrong = self._right * keep, self._wrong * keep
        (self._right if right else self._wrong)[:] += counts
        self._own[int(right), sequences] += 1

    def acceptance(self, depth: int) -> float:
        """How likely a guess at `depth` is right; at least as likely as a shallower one."""
        best = 0.0
        for at in range(1, depth + 1):
            seen = self._right[at] + self._wrong[at]
            hoped = max(self.HOPE, best)
            best = max(best, (self._right[at] + self.DOUBT * hoped) / (seen + self.DOUBT))
        return float(min(best, 0.99))

    def begin_step(self, sequences: Ints, exit_depths: Ints, costs: StepCosts | None) -> None:
        if len(exit_depths):
            mean = float(exit_depths.mean())
            self._mean += (1 - self.RECENT if self._mean else 1) * (mean - self._mean)
        if not self.lookahead:
            self._right, self._wrong = self._right * self.FORGETS, self._wrong * self.FORGETS
        self.lookahead = 0
        if costs is None or self._mean <= 1 or not (count := len(sequences)):
            return
        plain = 1 / self._time(costs, count)
        best = self.GAIN * plain
        for depth in self._depths:
            acceptance = self.acceptance(depth)
            for ahead in self._choices:
                rate = self._rate(costs, count, depth, ahead, acceptance)
                if rate > best:
                    best, self.draft_depth, self.lookahead = rate, depth, ahead
        if self.lookahead:
            self._needed = self._break_even(costs, count, plain)

    def _time(self, costs: StepCosts, count: int) -> float:
        """Without guesses: seconds for a token of each of `count` sequences."""
        return self._mean * (costs.per_pass + costs.per_row * count) + costs.per_boundary

    def _rate(
        self, costs: StepCosts, count: int, depth: int, ahead: int, acceptance: float
    ) -> float:
        """With guesses: tokens of a sequence a second."""
        tokens = 1 / (1 - acceptance)
        each = max(depth, self._mean / (ahead + 1))
        passes = self._mean + (tokens - 1) * each
        rows = count * max(self._mean / each, 1.0)
        seconds = passes * (costs.per_pass + costs.per_row * rows)
        return tokens / (seconds + passes / each * costs.per_boundary)

    def _break_even(self, costs: StepCosts, count: int, plain: float) -> float:
        """The acceptance from which on guesses are no slower."""
        low, high = 0.0, 0.99
        for _ in range(7):
            middle = (low + high) / 2
            if self._rate(costs, count, self.draft_depth, self.lookahead, middle) < plain:
                low = middle
            else:
                high = middle
        return high

    def allows(self, sequences: Ints) -> Bools:
        if not self.lookahead:
            return np.zeros(len(sequences), dtype=bool)
        wrong, right = self._own[:, sequences]
        hoped = self.OWN * self.acceptance(self.draft_depth)
        return (right + hoped) / (right + wrong + self.OWN) >= self._needed
