"""Learns what passes and boundaries cost while serving."""

import time

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.messages.progress import LoopProgress


class LinearCost:
    """Least squares of `fixed + slope * size` over past measurements; recent ones count more."""

    MEMORY = 0.99
    FLOOR = 0.1

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

    @property
    def fixed(self) -> float | None:
        """The cost at size 0; None until it can be distinguished from the slope.

        At least `FLOOR` of the mean cost, because an estimate of zero is noise, and waiting would
        then seem to cost nothing.
        """
        spread = self._weight * self._xx - self._x * self._x
        if self._weight < 5 or spread < 1e-6 * self._xx * self._weight:
            return None
        slope = (self._weight * self._xy - self._x * self._y) / spread
        fixed = (self._y - max(slope, 0.0) * self._x) / self._weight
        return max(fixed, self.FLOOR * self._y / self._weight)


class StepClock:
    """Times steps from one `schedule` to the next and learns `StepCosts` from them."""

    def __init__(self) -> None:
        self._passes = LinearCost()
        self._boundaries = LinearCost()
        self._started: float | None = None
        self._last: tuple[float, int] | None = None  # seconds in passes, rows of the boundary

    def begin(self) -> None:
        """A step is about to be scheduled, right after the one before."""
        now = time.perf_counter()
        if self._started is not None and self._last is not None:
            in_passes, rows = self._last
            if rows:
                self._boundaries.add(rows, now - self._started - in_passes)
        self._started, self._last = now, None

    def end(self, progress: LoopProgress, idle: bool) -> None:
        """The step is over. `idle`: nothing is left to do, so the time until the next step is not
        a cost.

        Passes that the host did not wait for are left out, because their time on the host is not
        their cost; so are boundaries in which the device still ran the last pass. The cost of a
        boundary depends on its rows: a prompt has one token but many rows.
        """
        times = progress.times
        for rows, seconds, waited in zip(
            progress.stats.passes, times.seconds, times.waited, strict=True
        ):
            if waited:
                self._passes.add(rows, seconds)
        counts = times.ended_idle and not idle
        self._last = (sum(times.seconds), progress.boundary_rows) if counts else None

    def pause(self) -> None:
        """The time until the next step is not a cost, as after an idle one."""
        self._last = None

    def costs(self) -> StepCosts | None:
        """What has been learned; None while it is not enough."""
        per_pass, per_boundary = self._passes.fixed, self._boundaries.fixed
        if per_pass is None or per_boundary is None or not per_pass + per_boundary:
            return None
        return StepCosts(per_pass, per_boundary)
