"""Ratios of engines that ran in turn, with their spread."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Student's t, two-sided, 95 %, by degrees of freedom; beyond them the normal law's is close.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
NORMAL = 1.96


@dataclass(frozen=True)
class Ratio:
    """The median over rounds, and around it the 95 % interval that their logarithms give the mean.

    The least and the greatest of a few rounds would not do for a spread: of two runs of three
    rounds on a machine that has not changed, all of one lie beyond all of the other one time in
    ten. With one round `low` and `high` are the value itself.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        middle, count = statistics.median(values), len(values)
        if count == 1:
            return cls(middle, middle, middle, 1)
        deviation = statistics.stdev(map(math.log, values))
        student = STUDENT[count - 2] if count - 2 < len(STUDENT) else NORMAL
        factor = math.exp(student * deviation / math.sqrt(count))
        return cls(middle, middle / factor, middle * factor, count)

    @classmethod
    def over(cls, above: Sequence[float], below: Sequence[float]) -> "Ratio":
        """Round by round, so that a machine that slows down from one to the next does not count."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def agrees(self, other: "Ratio") -> bool | None:
        """Whether the spreads overlap; None where one has none."""
        if 1 in (self.rounds, other.rounds):
            return None
        return self.low <= other.high and other.low <= self.high

    def times(self, factor: float) -> "Ratio":
        return Ratio(self.median * factor, self.low * factor, self.high * factor, self.rounds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.rounds == 1:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}, {self.rounds} rounds)"
