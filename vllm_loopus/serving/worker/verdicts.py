"""What a step decides by floating-point numbers: which rows exit, which states are NaN or infinite.

**Ranks.** Every rank of a tensor-parallel group runs the same control flow (`step/run.py`) over the
same data: all get the scheduler's output, including measured costs and free blocks, as one message.
What may differ is what each rank computes in floating point; nothing promises equal bits, since an
all-reduce may add up in another order on each. A rank that runs one pass more than the others waits
for them forever. So the first rank of the group decides, and its decisions are broadcast: equal on
all ranks by construction. That is one message of a few bytes a row for each pass that decides, and
none with a single rank. (Sampled tokens are vLLM's: every rank samples from the same gathered
logits with the same seeds.)

**Waiting.** Whoever reads from the device waits for it. So all that a pass decides is one tensor of
bytes, read once; sums that show NaN wait on the device for the next such reading, or for
`check_states`, once a step. `tests/serving/test_syncs.py` counts the readings.
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
        told = [part.contiguous().view(torch.uint8) for part in sent]
        read = to_host(self._group.broadcast(torch.cat(told) if told[1:] else told[0], src=0))
        end = 0
        for rows in watched:
            start, end = end, end + 4 * len(rows.sums)
            rows.fail_nonfinite(read[start:end].view(np.float32))
        return read[end:]
