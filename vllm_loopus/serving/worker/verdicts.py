"""The decisions of a step that depend on floating-point values: exits, and NaN or infinite states.

**Ranks.** Every rank of a tensor-parallel group runs the same control flow (`step/run.py`) over the
same data: all get the scheduler's output, including measured costs and free blocks, as one message.
Only floating-point results may differ between ranks, because an all-reduce may add in another order
on each. A rank that runs one pass more than the others would wait for them forever. So the first
rank of the group decides, and its decisions are broadcast. This takes one message of a few bytes
per row for each deciding pass, and none with a single rank. (Sampled tokens are vLLM's: every rank
samples from the same gathered logits with the same seeds.)

**Waiting.** Reading from the device waits for it. So the decisions of a pass are one tensor of
bytes, read once, and its copy is queued with the pass. The sums that show NaN stay on the device
until the next such reading. `tests/serving/test_syncs.py` counts the readings.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_loopus.serving.step.chunks import Bools, Ints
from vllm_loopus.serving.step.staircase import Staircases
from vllm_loopus.serving.worker import transfer
from vllm_loopus.serving.worker.nonfinite import WatchedRows


class Verdict:
    """Decisions on their way to the host; `step/run.py` calls it a reading."""

    def __init__(
        self,
        copy: transfer.HostCopy,
        watched: list[WatchedRows],
        fail: Callable[[WatchedRows, NDArray[np.float32]], None],
    ) -> None:
        self._copy, self._watched, self._fail = copy, watched, fail
        self._decided = np.zeros(0, dtype=np.uint8)

    def wait(self) -> Bools:
        """The mask of exits [S]. Fails the sequences watched before it was queued."""
        read, end = self._copy.wait(), 0
        for rows in self._watched:
            start, end = end, end + 4 * len(rows.sums)
            self._fail(rows, read[start:end].view(np.float32))
        self._decided = read[end:]
        exits: Bools = self._decided.astype(bool)
        return exits

    def tokens(self) -> Ints:
        """Tokens instead of exits [S], after `wait`."""
        return self._decided.view(np.int32).astype(np.int64)

    def complete(self, leaving: Bools) -> None:
        """Nothing waits for the decoder's reading."""


class Verdicts:
    """Collects what a step decides by, equal on all ranks of `group`."""

    def __init__(
        self,
        group: GroupCoordinator,
        stairs: Staircases,
        cleanse: Callable[[NDArray[Any]], None],
    ) -> None:
        """`cleanse`: removes NaN from blocks that nobody fails for."""
        self._group = group
        self._stairs = stairs
        self._cleanse = cleanse
        self._watched: list[WatchedRows] = []

    def watch(self, rows: WatchedRows) -> None:
        """Their sequences fail at the next reading if a state is NaN or infinite."""
        self._watched.append(rows)

    @property
    def watching(self) -> bool:
        """Whether states wait to be checked."""
        return bool(self._watched)

    def queue(self, exits: torch.Tensor | None) -> Verdict:
        """Queues the copy of the mask `exits` [S] or of tokens in int32, as the first rank has
        them, and of what is watched."""
        watched, self._watched = self._watched, []
        sent = [rows.sums for rows in watched] + ([] if exits is None else [exits])
        raw = [part.contiguous().view(torch.uint8) for part in sent]
        whole = self._group.broadcast(torch.cat(raw) if raw[1:] else raw[0], src=0)
        return Verdict(transfer.HostCopy(whole), watched, self._check)

    def _check(self, rows: WatchedRows, sums: NDArray[np.float32]) -> None:
        for blocks in rows.fail_nonfinite(sums, self._stairs):
            self._cleanse(blocks)
