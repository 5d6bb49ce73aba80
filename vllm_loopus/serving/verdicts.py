"""What a step decides by floating-point numbers: who leaves, whose states are no numbers.

**Ranks.** Every rank of a tensor-parallel group runs the same control flow (`step.py`) over the
same data: the scheduler's output, with it the measured costs and the free blocks, is one message to
all of them. What is left to differ is what each computes in floating point, and nothing promises
that two ranks get the same bits, for an all-reduce may add up in another order on each. A rank that
runs one pass more than the others waits for them for ever. So these decisions are taken by the
group's first rank and broadcast: equal on all ranks by construction, whatever their states are. One
message a pass that decides, of a byte a row; none with one rank. (Sampled tokens are vLLM's: every
rank samples from the same gathered logits with the same seeds.)

**Numbers.** A row whose state is NaN or infinite fails its sequence. Flags wait on the device for
the next decision, which has to be read anyway, or for `settle`, once a step.

**Waiting.** Whoever reads from the device waits for it. All that a pass decides is therefore one
tensor of bytes, read once: `tests/serving/test_syncs.py` counts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_loopus.serving.staircase import LoopedSequence, Rows
from vllm_loopus.serving.transfer import to_host


@dataclass
class _Watched:
    """Rows of one call of the model: entry `i` has the flags `offsets[i] .. offsets[i + 1] - 1`."""

    entries: list[tuple[LoopedSequence, int]]  # with its depth
    place: str
    offsets: NDArray[np.int64]
    flags: torch.Tensor  # bool [T]: not a number


class Verdicts:
    """Collects the flags of a step and reads them, equal on all ranks of `group`."""

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group
        self._watched: list[_Watched] = []

    def watch(
        self,
        rows: list[Rows],
        offsets: NDArray[np.int64],
        states: torch.Tensor,
        place: str = "",
    ) -> None:
        """Looks at `states` [T, H] of `rows`; `offsets` [E + 1] is the first state of each entry.
        `place` is for the message."""
        # NaN or infinite where one of them is, by far the cheapest way to look (`docs/log.md`).
        total = states.sum(dim=-1, dtype=torch.float32)
        self._watched.append(
            _Watched(
                [(entry.sequence, entry.depth) for entry in rows],
                place,
                offsets,
                ~torch.isfinite(total),
            )
        )

    def read(
        self, leaves: torch.Tensor, survival: torch.Tensor | None = None
    ) -> tuple[list[bool], list[float]]:
        """`leaves` [S] and `survival` [S] (float32) as the first rank has them; fails the sequences
        watched so far."""
        watched, self._watched = self._watched, []
        parts = [calls.flags for calls in watched] + [leaves]
        parts = [part.view(torch.uint8) for part in parts]
        if survival is not None:
            parts.append(survival.contiguous().view(torch.uint8))
        read = to_host(self._group.broadcast(torch.cat(parts), src=0))
        for calls in watched:
            found, read = np.split(read, [len(calls.flags)])
            if found.any():
                entry = np.searchsorted(calls.offsets, np.flatnonzero(found), side="right") - 1
                for index in np.unique(entry):
                    sequence, depth = calls.entries[index]
                    sequence.fail(f"NaN or infinite hidden states {calls.place}at depth {depth}")
        decided, survived = np.split(read, [len(leaves)])
        return decided.astype(bool).tolist(), np.copy(survived).view(np.float32).tolist()

    def settle(self) -> None:
        """Fails the sequences watched so far."""
        if self._watched:
            self.read(self._watched[0].flags[:0])


def cleanse(caches: list[Any], blocks: NDArray[np.int64]) -> None:
    """Puts zero for what is not a number in `blocks` of all `caches`, [num_blocks, ...] each.

    A row that attends masks what it may not see with a weight of zero, and zero times NaN is NaN:
    whoever gets the blocks next would fail too. Numbers stay as they are, for others may share the
    first blocks.
    """
    for cache in caches:
        index = torch.from_numpy(blocks).to(cache.device)
        cache[index] = torch.nan_to_num(cache[index], nan=0.0, posinf=0.0, neginf=0.0)
