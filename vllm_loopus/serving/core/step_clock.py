"""Learns what passes and boundaries cost while serving."""

import time

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.messages.progress import LoopProgress


class LinearCost:
    """Least squares of `fixed + slope * size` over past measurements; recent ones count more."""

    MEMORY = 0.99
    FLOOR = 0.1
    DOUBT = 0.02  # sizes that hardly differ say little of the slope: it is then taken as smaller

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, size: float, seconds: float) -> None:
        """One measurement."""
        keep = self.MEMORY
        self._weight = self._weight * keep + 1
        self._x = self._x * keep + size
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + size * size
        self._xy = self._xy * keep + size * seconds

    def _line(self) -> tuple[float, float] | None:
        spread = self._weight * self._xx - self._x * self._x
        if self._weight < 5 or spread < 1e-6 * self._xx * self._weight:
            return None
        spread += self.DOUBT * self._x * self._x
        slope = max((self._weight * self._xy - self._x * self._y) / spread, 0.0)
        return (self._y - slope * self._x) / self._weight, slope

    @property
    def slope(self) -> float:
        """The cost of one more; 0 until it is known."""
        line = self._line()
        return 0.0 if line is None else line[1]

    @property
    def fixed(self) -> float | None:
        """The cost at size 0; None until it can be distinguished from the slope.

        At least `FLOOR` of the mean cost, because an estimate of zero is noise, and waiting would
        then seem to cost nothing.
        """
        if (line := self._line()) is None:
            return None
        return max(line[0], self.FLOOR * self._y / self._weight)

    def at(self, size: float) -> float | None:
        """The cost at a size, None if it is not known."""
        line = self._line()
        return None if line is None else line[0] + line[1] * size


class StepClock:
    """Times steps from one `schedule` to the next and learns `StepCosts` from them."""

    def __init__(self) -> None:
        self._passes = LinearCost()
        self._boundaries = LinearCost()
        self._started: float | None = None
        self._gap = self._host = 0.0
        self._last: tuple[float | None, int] | None = None  # in passes; rows
        self.seconds: float | None = None  # of the last step; None if there was nothing to do

    def begin(self) -> None:
        """A step is about to be scheduled, right after the one before."""
        now = time.perf_counter()
        self.seconds = None
        if self._started is not None and self._last is not None:
            self.seconds = now - self._started
            in_passes, rows = self._last
            if rows and in_passes is not None:
                self._boundaries.add(rows, max(now - self._started - in_passes, 0.0))
        self._started, self._last = now, None

    def end(self, progress: LoopProgress, idle: bool) -> None:
        """The step is over. `idle`: nothing is left to do, so the time until the next step is not
        a cost.

        Passes whose time is not known are taken to be as long as others of their size. With
        overlap, the last pass of a step ends in the next one, as that of the step before ended in
        this. The cost of a boundary depends on its rows: a prompt has one token but many rows.
        """
        rows_of, seconds_of = progress.stats.passes, progress.times.seconds
        self._gap, self._host = progress.times.gap, progress.times.host
        in_passes: float | None = 0.0
        for rows, seconds in zip(rows_of, seconds_of, strict=True):
            if seconds is not None:
                self._passes.add(rows, seconds)
            else:
                seconds = self._passes.at(rows)
            in_passes = None if in_passes is None or seconds is None else in_passes + seconds
        self._last = None if idle else (in_passes, progress.boundary_rows)

    def pause(self) -> None:
        """The time until the next step is not a cost, as after an idle one."""
        self._last = None

    def costs(self) -> StepCosts | None:
        """What has been learned; None while it is not enough."""
        per_pass, per_boundary = self._passes.fixed, self._boundaries.fixed
        if per_pass is None or per_boundary is None or not per_pass + per_boundary:
            return None
        return StepCosts(per_pass, per_boundary, self._passes.slope, self._gap, self._host)
