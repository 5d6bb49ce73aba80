"""The decisions of a step that depend on floating-point values: exits, and NaN or infinite states.

**Ranks.** Every rank of a tensor-parallel group runs the same control flow (`step/run.py`) over the
same data: all get the scheduler's output, including measured costs and free blocks, as one message.
Only floating-point results may differ between ranks, because an all-reduce may add in another order
on each. A rank that runs one pass more than the others would wait for them forever. So the first
rank of the group decides, and its decisions are broadcast. This takes one message of a few bytes
per row for each deciding pass, and none with a single rank. (Sampled tokens are vLLM's: every rank
samples from the same gathered logits with the same seeds.)

**Waiting.** Reading from the device waits for it. So the decisions of a pass are one tensor of
bytes, read once. The sums that show NaN stay on the device until the next such reading, or until
`check_states`, once per step. `tests/serving/test_syncs.py` counts the readings.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_loopus.serving.worker.nonfinite import WatchedRows
from vllm_loopus.serving.worker.transfer import to_host


class Verdicts:
    """Collects what a step decides by and reads it, equal on all ranks of `group`."""

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group
        self._watched: list[WatchedRows] = []

    def watch(self, rows: WatchedRows) -> None:
        """Their sequences fail at the next reading if a state is NaN or infinite."""
        self._watched.append(rows)

    def read(
        self, exits: torch.Tensor, carry: torch.Tensor
    ) -> tuple[list[bool], NDArray[np.float32]]:
        """The mask `exits` [S] and the exit rule's `carry` [S, C] as the first rank has them. Fails
        the sequences watched so far."""
        count = len(exits)
        decided = self._read([exits, *([carry.flatten()] if carry.numel() else [])])
        carried = np.copy(decided[count:]).view(np.float32)
        return decided[:count].astype(bool).tolist(), carried.reshape(carry.shape)

    def check_states(self) -> None:
        """Fails the sequences watched so far."""
        if self._watched:
            self._read([])

    def _read(self, parts: list[torch.Tensor]) -> NDArray[np.uint8]:
        """The bytes of `parts`."""
        watched, self._watched = self._watched, []
        sent = [rows.sums for rows in watched] + parts
        raw = [part.contiguous().view(torch.uint8) for part in sent]
        read = to_host(self._group.broadcast(torch.cat(raw) if raw[1:] else raw[0], src=0))
        end = 0
        for rows in watched:
            start, end = end, end + 4 * len(rows.sums)
            rows.fail_nonfinite(read[start:end].view(np.float32))
        return read[end:]
