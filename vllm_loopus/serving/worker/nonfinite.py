"""NaN and infinite states: found on the device, and removed from memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_loopus.serving.step.chunks import Ints
from vllm_loopus.serving.step.staircase import Staircases
from vllm_loopus.serving.worker.row_layout import RowLayout


@dataclass(frozen=True)
class WatchedRows:
    """The rows of one model call, and a sum over each row's state that shows whether all of its
    numbers are finite."""

    layouts: Sequence[RowLayout]  # of the passes of the call; the sums are those of the last one
    life: Ints  # [C]: of the chunks' sequences at the call
    sums: torch.Tensor  # float32 [T]
    place: str

    @classmethod
    def of(
        cls,
        stairs: Staircases,
        layouts: Sequence[RowLayout],
        states: torch.Tensor,
        place: str = "",
    ) -> "WatchedRows":
        """`states` [T, H] of the rows, after the last pass of `layouts`. `place` is for the
        message."""
        # NaN or infinite if one of them is: by far the cheapest way to look (`docs/log.md`).
        sums = states.sum(dim=-1, dtype=torch.float32)
        return cls(layouts, stairs.life[layouts[-1].spans.sequence], sums, place)

    def fail_nonfinite(self, sums: NDArray[np.float32], stairs: Staircases) -> list[NDArray[Any]]:
        """Fails the sequences of rows whose sum, now on the host, is NaN or infinite. Returns the
        blocks of such rows whose sequences have been removed since, or only guessed them."""
        finite = np.isfinite(sums)
        left: list[NDArray[Any]] = []
        if finite.all():
            return left
        spans = self.layouts[-1].spans
        for index in np.unique(spans.chunk[~finite]):
            sequence = int(spans.sequence[index])
            if stairs.life[sequence] != self.life[index]:
                left += [layout.block_table[index] for layout in self.layouts]
                continue
            depth = self.layouts[-1].depth[index]
            # The first such row: positions before a guess may come along in its chunk.
            end = int(spans.positions[(spans.chunk == index) & ~finite][0]) + 1
            reason = f"NaN or infinite hidden states {self.place}at depth {depth}"
            if not stairs.fail_at(sequence, end, reason):
                left += [layout.block_table[index] for layout in self.layouts]
        return left


def cleanse(memory: list[torch.Tensor], blocks: NDArray[np.int64]) -> None:
    """Replaces NaN and infinity by zero in `blocks` of the floating-point `memory`, tensors
    [num_blocks, ...].

    Attention gives masked positions a weight of zero, and zero times NaN is NaN, so the next
    sequence with these blocks would fail too. Finite numbers are not changed, because other
    sequences may share the first blocks.
    """
    for numbers in memory:
        index = torch.from_numpy(blocks).to(numbers.device)
        if numbers.itemsize > 1:
            numbers[index] = torch.nan_to_num(numbers[index], nan=0.0, posinf=0.0, neginf=0.0)
            continue
        stored = numbers.view(torch.uint8)  # torch does little with numbers of 8 bits
        chosen = stored[index]
        stored[index] = chosen.masked_fill(~chosen.view(numbers.dtype).float().isfinite(), 0)
