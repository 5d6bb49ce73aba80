"""Ratios of engines that ran in turn, with their spread."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Ratio:
    """The median over rounds, and the least and greatest of them."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        return cls(statistics.median(values), min(values), max(values), len(values))

    @classmethod
    def over(cls, above: Sequence[float], below: Sequence[float]) -> "Ratio":
        """Round by round, so that a machine that slows down from one to the next does not count."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def agrees(self, other: "Ratio") -> bool:
        """Whether the spreads overlap."""
        return self.low <= other.high and other.low <= self.high

    def times(self, factor: float) -> "Ratio":
        return Ratio(self.median * factor, self.low * factor, self.high * factor, self.rounds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.rounds == 1:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f}, {self.rounds} rounds)"
