"""NaN and infinite states: found on the device, and removed from memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_loopus.serving.step.staircase import Chunk
from vllm_loopus.serving.worker.row_layout import RowLayout


@dataclass(frozen=True)
class WatchedRows:
    """The rows of one model call, and a sum over each row's state that shows whether all of its
    numbers are finite."""

    chunks: Sequence[Chunk]  # [C], those of the layout, which has their depths
    layout: RowLayout
    sums: torch.Tensor  # float32 [T]
    place: str

    @classmethod
    def of(
        cls, chunks: Sequence[Chunk], layout: RowLayout, states: torch.Tensor, place: str = ""
    ) -> "WatchedRows":
        """`states` [T, H] of `chunks`, at the depths of `layout`. `place` is for the message."""
        # NaN or infinite if one of them is: by far the cheapest way to look (`docs/log.md`).
        return cls(chunks, layout, states.sum(dim=-1, dtype=torch.float32), place)

    def fail_nonfinite(self, sums: NDArray[np.float32]) -> None:
        """Fails the sequences of rows whose sum, now on the host, is NaN or infinite."""
        finite = np.isfinite(sums)
        if finite.all():
            return
        for index in np.unique(self.layout.spans.chunk[~finite]):
            self.chunks[index].sequence.fail(
                f"NaN or infinite hidden states {self.place}at depth {self.layout.depth[index]}"
            )


def cleanse(caches: list[Any], blocks: NDArray[np.int64]) -> None:
    """Replaces NaN and infinity by zero in `blocks` of all `caches`, [num_blocks, ...] each.

    Attention gives masked positions a weight of zero, and zero times NaN is NaN, so the next
    sequence with these blocks would fail too. Finite numbers are not changed, because other
    sequences may share the first blocks.
    """
    for cache in caches:
        index = torch.from_numpy(blocks).to(cache.device)
        cache[index] = torch.nan_to_num(cache[index], nan=0.0, posinf=0.0, neginf=0.0)
