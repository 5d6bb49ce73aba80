"""Where the rows of one model call lie: positions, block tables and slots by depth.

A slot is `block id * block size + offset`, the same number for the K/V of every layer and for the
state of a position at a depth: planes only differ in their blocks (see `model/planes.py`).

C chunks (positions of one sequence at one depth) have T rows (positions) together.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from vllm.utils.math_utils import cdiv

from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints


@dataclass(frozen=True, eq=False)
class Spans:
    """Which positions of which sequences a call computes, at whatever depths."""

    block_size: int
    sequence: Ints  # [C]: row of the sequence in the block tables
    starts: Ints  # [C]
    ends: Ints  # [C]: length of the sequence as the chunk sees it
    offsets: Ints  # [C + 1]: first row of each chunk
    chunk: Ints  # [T]: index of the chunk
    positions: Ints  # [T]
    column: Ints  # [T]: which block of the sequence the row is in
    within: Ints  # [T]: and where in the block

    @classmethod
    def of(cls, chunks: Chunks, block_size: int) -> "Spans":
        starts, lengths, count = chunks.start, chunks.sizes, len(chunks)
        if (lengths == 1).all():  # as in most passes
            offsets = np.arange(count + 1)
            chunk, positions = offsets[:-1], starts
        else:
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            chunk = np.repeat(np.arange(count), lengths)
            positions = np.arange(offsets[-1]) - offsets[:-1][chunk] + starts[chunk]
        column, within = np.divmod(positions, block_size)
        return cls(
            block_size,
            chunks.sequence,
            starts,
            chunks.end,
            offsets,
            chunk,
            positions,
            column,
            within,
        )

    def are(self, chunks: Chunks) -> bool:
        """Whether the positions are those of `chunks`."""
        return (
            np.array_equal(self.sequence, chunks.sequence)
            and np.array_equal(self.starts, chunks.start)
            and np.array_equal(self.ends, chunks.end)
        )

    @cached_property
    def last_rows(self) -> NDArray[np.int64]:
        """The last row of each chunk [C]."""
        return self.offsets[1:] - 1

    @cached_property
    def max_query_len(self) -> int:
        return int((self.ends - self.starts).max())

    @cached_property
    def max_seq_len(self) -> int:
        return int(self.ends.max())

    @cached_property
    def max_blocks(self) -> int:
        """How many blocks the longest sequence needs."""
        return cdiv(self.max_seq_len, self.block_size)

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class ExtraSlots:
    """Rows [M] of a call whose K/V and states also go to `slots` [M] of other depths."""

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]


@dataclass
class RowLayout:
    """Where the rows of a call lie."""

    tables: NDArray[np.int32]  # of all sequences [S, N, blocks]
    spans: Spans
    depth: NDArray[np.int64]  # [C], from 1
    block_table: NDArray[np.int32]  # [C, blocks] of each chunk at its depth
    own_slots: NDArray[np.int64]  # [T] of every row at its own depth; -1 beyond the last plane

    @property
    def planes(self) -> int:
        """The depth of the last plane."""
        return self.tables.shape[1]

    def follows(self, before: "RowLayout") -> bool:
        """Whether the rows are those of the call `before`, all one depth deeper."""
        return self.spans is before.spans and bool((self.depth == before.depth + 1).all())

    def slots(self, depth: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slot of every row [T] in the plane of its chunk's `depth` [C], or in the last one."""
        spans, depth = self.spans, np.minimum(depth, self.planes)
        blocks = self.tables[spans.sequence[spans.chunk], depth[spans.chunk] - 1, spans.column]
        return slots_of(blocks, spans.within, spans.block_size)

    def extra_slots(self, chunks: Ints, depths: Bools) -> ExtraSlots | None:
        """The last rows of `chunks` [K], and the slots of their positions at the `depths`
        [K, N + 1] given for each as a mask; None if there are none."""
        which, planes = np.nonzero(depths)
        if not len(which):
            return None
        spans = self.spans
        chosen = chunks[which]
        rows = spans.last_rows[chosen]
        blocks = self.tables[spans.sequence[chosen], planes - 1, spans.column[rows]]
        return ExtraSlots(rows, slots_of(blocks, spans.within[rows], spans.block_size))


def slots_of(
    blocks: NDArray[np.int32], within: NDArray[np.int64], block_size: int
) -> NDArray[np.int64]:
    return blocks.astype(np.int64) * block_size + within
