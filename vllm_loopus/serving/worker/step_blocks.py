"""The free blocks offered for a step, as they are taken."""

import numpy as np
from numpy.typing import NDArray

from vllm_loopus.serving.step.chunks import Ints


class StepBlocks:
    """One offer, as it is used up. Sequences are rows of the block tables."""

    def __init__(self, free: Ints, promised: Ints) -> None:
        """`free`: ids of blocks, in the order in which they are to be taken. `promised` [S]: how
        many of them are kept for each sequence."""
        self._free = free
        self._next = 0
        self._promised = promised
        self._common = len(free) - int(promised.sum())
        assert self._common >= 0, "more blocks promised than offered"

    @classmethod
    def none(cls) -> "StepBlocks":
        """Nothing is offered."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    def enough_for_all(self, count: int) -> bool:
        """Whether anyone can take `count` blocks without those that are promised to others."""
        return count <= self._common

    def left(self) -> "StepBlocks":
        """What is left, to be taken on trial."""
        return StepBlocks(self._free[self._next :], self._promised.copy())

    def available(self, sequence: int) -> int:
        """How many blocks the sequence may take."""
        return int(self._promised[sequence]) + self._common

    def take(self, sequences: Ints) -> NDArray[np.int64]:
        """The ids of a block for each of `sequences`, which may repeat; of those that were promised
        to a sequence, while there are any."""
        count = len(sequences)
        if self._promised.any():
            takers, counts = np.unique(sequences, return_counts=True)
            own = np.minimum(self._promised[takers], counts)
            self._promised[takers] -= own
            self._common -= count - int(own.sum())
        else:
            self._common -= count
        assert self._common >= 0, "no block left"
        self._next += count
        return self._free[self._next - count : self._next]
