"""Ratios of engines that ran in turn, with their spread."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import t as student_t

CONFIDENCE = 0.95  # of the interval, two-sided


@dataclass(frozen=True)
class Ratio:
    """The median over rounds, and around it the 95 % interval of the mean of their logarithms.

    The least and the greatest of a few rounds are a poor spread: of two runs of three rounds on a
    machine that has not changed, all of one are greater than all of the other one time in ten.
    With one round `low` and `high` are the value itself.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        """`values`: a positive number a round.

        Raises `ValueError` (`StatisticsError`) without values.
        """
        middle, count = statistics.median(values), len(values)
        if count == 1:
            return cls(middle, middle, middle, 1)
        deviation = statistics.stdev(map(math.log, values))
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1))
        factor = math.exp(quantile * deviation / math.sqrt(count))
        return cls(middle, middle / factor, middle * factor, count)

    @classmethod
    def over(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """Round by round, so that a machine that slows down from one to the next does not count.

        Raises `ValueError` for different numbers of rounds.
        """
        return cls.of([a / b for a, b in zip(numerators, denominators, strict=True)])

    def agrees(self, other: "Ratio") -> bool | None:
        """Whether the intervals overlap; None where one of the two has a single round."""
        if 1 in (self.rounds, other.rounds):
            return None
        return self.low <= other.high and other.low <= self.high

    def times(self, factor: float) -> "Ratio":
        """Median and interval times a factor."""
        return Ratio(self.median * factor, self.low * factor, self.high * factor, self.rounds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.rounds == 1:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}, {self.rounds} rounds)"
