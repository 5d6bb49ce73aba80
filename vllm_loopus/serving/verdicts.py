"""What a step decides by floating-point numbers: who leaves, whose states are no numbers.

**Ranks.** Every rank of a tensor-parallel group runs the same control flow (`step.py`) over the
same data: the scheduler's output, with it the measured costs and the free blocks, is one message to
all of them. What is left to differ is what each computes in floating point, and nothing promises
that two ranks get the same bits, for an all-reduce may add up in another order on each. A rank that
runs one pass more than the others waits for them for ever. So these decisions are taken by the
group's first rank and broadcast: equal on all ranks by construction, whatever their states are. One
message a pass that decides, of a few bytes a row; none with one rank. (Sampled tokens are vLLM's:
every rank samples from the same gathered logits with the same seeds.)

**Numbers.** A row whose state is NaN or infinite fails its sequence. Sums wait on the device for
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

from vllm_loopus.serving.batch_layout import BatchLayout
from vllm_loopus.serving.staircase import Rows
from vllm_loopus.serving.transfer import to_host


@dataclass
class _Watched:
    """Rows of one call of the model."""

    rows: list[Rows]  # [E], the entries of the layout, which has their depths
    place: str
    layout: BatchLayout
    totals: torch.Tensor  # float32 [T]: no number where a state is none


class Verdicts:
    """Collects what a step decides by and reads it, equal on all ranks of `group`."""

    def __init__(self, group: GroupCoordinator) -> None:
        self._group = group
        self._watched: list[_Watched] = []

    def watch(
        self,
        rows: list[Rows],
        layout: BatchLayout,
        states: torch.Tensor,
        place: str = "",
    ) -> None:
        """Looks at `states` [T, H] of `rows`, at the depths of `layout`. `place` is for the
        message."""
        # NaN or infinite where one of them is, by far the cheapest way to look (`docs/log.md`).
        totals = states.sum(dim=-1, dtype=torch.float32)
        self._watched.append(_Watched(rows, place, layout, totals))

    def read(
        self, leaves: torch.Tensor, survival: torch.Tensor | None = None
    ) -> tuple[list[bool], list[float]]:
        """`leaves` [S] and `survival` [S] (float32) as the first rank has them; fails the sequences
        watched so far."""
        decided = self._read([leaves] if survival is None else [leaves, survival])
        survived = np.copy(decided[len(leaves) :])
        return decided[: len(leaves)].astype(bool).tolist(), survived.view(np.float32).tolist()

    def _read(self, parts: list[torch.Tensor]) -> NDArray[np.uint8]:
        """The bytes of `parts`, and fails sequences."""
        watched, self._watched = self._watched, []
        parts = [calls.totals for calls in watched] + parts
        told = [part.contiguous().view(torch.uint8) for part in parts]
        read = to_host(self._group.broadcast(torch.cat(told) if told[1:] else told[0], src=0))
        totals = 4 * sum(len(calls.totals) for calls in watched)
        self._fail(watched, read[:totals].view(np.float32))
        return read[totals:]

    @staticmethod
    def _fail(watched: list[_Watched], totals: NDArray[np.float32]) -> None:
        """Fails the sequences with a total that is no number; `totals` are of all calls in turn."""
        finite = np.isfinite(totals)
        if finite.all():
            return
        ends = np.cumsum([len(calls.totals) for calls in watched])
        for calls, numbers in zip(watched, np.split(finite, ends[:-1]), strict=True):
            for index in np.unique(calls.layout.spans.entry[~numbers]):
                calls.rows[index].sequence.fail(
                    f"NaN or infinite hidden states {calls.place}at depth "
                    f"{calls.layout.depth[index]}"
                )

    def settle(self) -> None:
        """Fails the sequences watched so far."""
        if self._watched:
            self._read([])


def cleanse(caches: list[Any], blocks: NDArray[np.int64]) -> None:
    """Puts zero for what is not a number in `blocks` of all `caches`, [num_blocks, ...] each.

    A row that attends masks what it may not see with a weight of zero, and zero times NaN is NaN:
    whoever gets the blocks next would fail too. Numbers stay as they are, for others may share the
    first blocks.
    """
    for cache in caches:
        index = torch.from_numpy(blocks).to(cache.device)
        cache[index] = torch.nan_to_num(cache[index], nan=0.0, posinf=0.0, neginf=0.0)
