"""Where the rows of one call of the model lie: positions, block tables and slots by depth.

A slot is `block id * block size + offset`, the same number for K/V of every layer and for the
state of a position at a depth: planes differ in their blocks alone (see `planes.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from vllm.utils.math_utils import cdiv


@dataclass(frozen=True, eq=False)
class Spans:
    """Which positions of which sequences a batch holds, at whatever depths: E entries (chunks of
    a sequence), T rows."""

    chunks: list[tuple[int, int, int]]  # [E]: index of the sequence, first position, end
    block_size: int
    ends: NDArray[np.int64]  # [E]: sequence length as the entry sees it
    offsets: NDArray[np.int64]  # [E + 1]: first row of each entry
    sequence: NDArray[np.int64]  # [E]
    entry: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]
    column: NDArray[np.int64]  # [T]: which block of the sequence a row is in
    within: NDArray[np.int64]  # [T]: and where in the block

    @classmethod
    def of(cls, chunks: list[tuple[int, int, int]], block_size: int) -> "Spans":
        sequence, starts, ends = np.array(chunks, dtype=np.int64).T
        count = len(chunks)
        if all(end - start == 1 for _, start, end in chunks):  # as in most passes
            offsets = np.arange(count + 1)
            entry, positions = offsets[:-1], starts
        else:
            lengths = ends - starts
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            entry = np.repeat(np.arange(count), lengths)
            positions = np.arange(offsets[-1]) - offsets[:-1][entry] + starts[entry]
        column, within = np.divmod(positions, block_size)
        return cls(
            chunks,
            block_size,
            ends,
            offsets,
            sequence,
            entry,
            positions,
            column,
            within,
        )

    @cached_property
    def last_rows(self) -> NDArray[np.int64]:
        """Index of each entry's last row [E]."""
        return self.offsets[1:] - 1

    @cached_property
    def max_query_len(self) -> int:
        return max(end - start for _, start, end in self.chunks)

    @cached_property
    def max_seq_len(self) -> int:
        return max(end for _, _, end in self.chunks)

    @cached_property
    def max_blocks(self) -> int:
        """Blocks that the longest needs."""
        return cdiv(self.max_seq_len, self.block_size)

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class BatchLayout:
    """Where the rows of a batch lie. E entries, T rows."""

    tables: NDArray[np.int32]  # of all sequences [S, N, blocks]
    spans: Spans
    depth: NDArray[np.int64]  # [E], from 1
    block_table: NDArray[np.int32]  # [E, blocks] of each entry at its depth
    own_slots: NDArray[np.int64]  # [T] of every row at its own depth

    def follows(self, before: "BatchLayout") -> bool:
        """Whether the rows are those of the batch `before`, all one deeper."""
        return self.spans is before.spans and bool((self.depth == before.depth + 1).all())

    def slots(self, depth: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slot of every row [T] in the plane of its entry's `depth` [E]."""
        spans = self.spans
        blocks = self.tables[spans.sequence[spans.entry], depth[spans.entry] - 1, spans.column]
        return slots_of(blocks, spans.within, spans.block_size)

    def through(
        self, entries: Sequence[int], depths: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Last rows of `entries`, and slots of their positions at the `depths` of each: a row for
        each slot [M]."""
        spans = self.spans
        chosen = np.repeat(np.array(entries), [len(of_entry) for of_entry in depths])
        planes = np.array([depth for of_entry in depths for depth in of_entry], dtype=np.int64)
        rows = spans.last_rows[chosen]
        blocks = self.tables[spans.sequence[chosen], planes - 1, spans.column[rows]]
        return rows, slots_of(blocks, spans.within[rows], spans.block_size)


def slots_of(
    blocks: NDArray[np.int32], within: NDArray[np.int64], block_size: int
) -> NDArray[np.int64]:
    return blocks.astype(np.int64) * block_size + within
