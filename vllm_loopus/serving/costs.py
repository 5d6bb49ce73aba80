"""What passes and boundaries cost, measured while serving."""

import time

from vllm_loopus.serving.boundary import StepCosts

COSTS = "loopus_costs"  # attribute of a scheduler output: `StepCosts`, or None while unknown


class LinearCost:
    """Least squares of `fixed + slope * size` over past measurements, recent ones counting more."""

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
        """The cost at size 0; None before there is anything to tell it from the slope.

        At least `FLOOR` of the mean cost: an estimate of nothing is noise, and would let sequences
        idle for free.
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

    def end(self, passes: list[int], seconds: list[float], at_boundary: int, idle: bool) -> None:
        """The step is over. `at_boundary`: rows of encoder and decoder together, which is what the
        boundary costs go by (a prompt has one token and many rows); 0 where nobody was decoded.
        `idle`: nothing is left to do, the time to the next step is not ours."""
        for rows, taken in zip(passes, seconds, strict=True):
            self._passes.add(rows, taken)
        self._last = None if idle else (sum(seconds), at_boundary)

    def pause(self) -> None:
        """The time until the next step is not ours, as after an idle one."""
        self._last = None

    def costs(self) -> StepCosts | None:
        """What has been learned; None while it is not enough."""
        per_pass, per_boundary = self._passes.fixed, self._boundaries.fixed
        if per_pass is None or per_boundary is None or not per_pass + per_boundary:
            return None
        return StepCosts(per_pass, per_boundary)
