"""How often guesses are right: by the depth at which they are made, and by sequence."""

import numpy as np

from vllm_loopus.serving.step.chunks import Ints


class Acceptance:
    """Learns from outcomes; recent ones count more. What has not been seen is hoped for."""

    HOPE, DOUBT = 0.92, 6.0  # what acceptance is taken for before it is seen, and its weight
    MEMORY = 0.99  # weight of the past after each outcome
    # And after each step without guesses, or with guesses at another depth, so that they are tried
    # again.
    RESTING, UNUSED = 0.999, 0.99
    OWN = 8.0  # outcomes after which those of a sequence itself count as much as all others
    MOST = 0.99

    def __init__(self, max_loops: int) -> None:
        self._right = np.zeros(max_loops + 1)
        self._wrong = np.zeros(max_loops + 1)
        self._own = np.zeros((2, 8))  # wrong and right, by row of the sequence

    def add(self, index: int) -> None:
        """A sequence gets the row `index`."""
        if (more := index + 1 - self._own.shape[1]) > 0:
            self._own = np.pad(self._own, ((0, 0), (0, more + index)))
        self._own[:, index] = 0

    def observe(self, sequences: Ints, depth: Ints, right: bool) -> None:
        """Guesses of `sequences` at `depth` were all right, or all wrong."""
        if not len(sequences):
            return
        counts = np.bincount(depth, minlength=len(self._right))
        keep = self.MEMORY**counts
        self._right, self._wrong = self._right * keep, self._wrong * keep
        (self._right if right else self._wrong)[:] += counts
        self._own[int(right), sequences] += 1

    def forget(self, used: int | None) -> None:
        """A step is over in which guesses were made at the depth `used`, or none."""
        keep = np.full(len(self._right), self.RESTING if used is None else self.UNUSED)
        if used is not None:
            keep[used] = 1.0
        self._right, self._wrong = self._right * keep, self._wrong * keep

    def at(self, depth: int) -> float:
        """How likely a guess at `depth` is right; at least as likely as a shallower one."""
        best = 0.0
        for shallower in range(1, depth + 1):
            right, wrong = self._right[shallower], self._wrong[shallower]
            hoped = max(self.HOPE, best)
            best = max(best, (right + self.DOUBT * hoped) / (right + wrong + self.DOUBT))
        return float(min(best, self.MOST))

    def of(self, sequences: Ints, depth: int) -> np.ndarray:
        """The same for each of `sequences`, by what they guessed before."""
        wrong, right = self._own[:, sequences]
        return (right + self.OWN * self.at(depth)) / (right + wrong + self.OWN)
