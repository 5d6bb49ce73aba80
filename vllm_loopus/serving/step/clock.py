"""How long passes take, and the host: told from the moments at which the host waits."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceClock:
    """Times passes on a device that may work asynchronously.

    A call is over when the host has waited for it. If it had to wait, it knows the moment, and that
    the next call that was queued begins then. So a pass is timed if the host waited both for what
    came before it and for its own end. On a device that is idle, a pass begins when the host has
    read what came before.
    """

    MEMORY = 0.9
    BLOCKED = 3e-5  # seconds: a shorter wait was none, and the device was done before

    def __init__(self, asynchronous: bool) -> None:
        """`asynchronous`: launching returns before the device is done."""
        self._asynchronous = asynchronous
        self._reached: float | None = None  # when the device began what it does now, if known
        self._read: float | None = None  # the end of the last wait, if nothing was launched since
        self._launching = 0.0
        self._began = self._waited = 0.0
        self.gap = 0.0  # seconds from the end of a wait to the next launch, recent ones mostly
        self.host = 0.0  # seconds of host work in a step, without waiting; recent ones mostly

    def step(self) -> None:
        """A step begins."""
        now = time.perf_counter()
        busy = now - self._began - self._waited
        if self._began and (not self.host or busy < 10 * self.host):  # else there was nothing to do
            self.host += (1 - self.MEMORY if self.host else 1) * (busy - self.host)
        self._began, self._waited = now, 0.0
        self._read = None  # the time since then was not spent on a pass

    def launch(self, idle: bool) -> None:
        """A call of passes is about to be launched; `idle`: the device has nothing else to do."""
        self._launching = time.perf_counter()
        if idle:
            if self._read is not None:
                self.gap += (1 - self.MEMORY) * (self._launching - self._read - self.gap)
            self._reached = self._read or self._launching
        self._read = None

    def launched(self) -> float | None:
        """It has been launched. Its seconds, if it is over already."""
        return None if self._asynchronous else time.perf_counter() - self._launching

    def decoder(self) -> None:
        """The decoder is launched."""
        self._read = None

    @contextmanager
    def waiting(self, more: bool = False) -> Iterator[list[float]]:
        """Inside, the host waits for the next call that was queued; `more`: for another result of
        the one before. Afterwards the list has the seconds of that call, if they are known."""
        known: list[float] = []
        began = time.perf_counter()
        yield known
        now = time.perf_counter()
        self._waited += now - began
        blocked = now - began > self.BLOCKED
        if blocked and self._reached is not None:
            known.append(now - self._reached)
        if blocked or not more:
            self._reached = now if blocked else None
        self._read = now
