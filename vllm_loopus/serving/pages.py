"""Block tables and slots of running sequences, by depth; states in paged memory.

A slot is `block id * block size + offset`, the same number for K/V of every layer and for the
state of a position at a depth: planes differ in their blocks alone (see `planes.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.math_utils import cdiv

from vllm_loopus.serving.blocks import BlockOffer, StepBlocks, TakenBlock
from vllm_loopus.serving.staircase import LoopedSequence, Rows

BlockIds = Sequence[Sequence[int]]  # one list a KV cache group, that is, a depth


class PageTables:
    """Block tables of all running sequences: [sequence, depth, block] -> block id, 0 where none is.

    Planes above depth 1 get their blocks in `make_room`, from the offer of the step. The tables
    also remember which blocks the decoder has gone through, for those that are found again in the
    prefix cache: a cached block is complete but for the decoder's K/V.
    """

    def __init__(self, num_depths: int, max_blocks: int, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._tables = np.zeros((8, num_depths, max_blocks), dtype=np.int32)
        self._at_first: dict[str, int] = {}  # blocks of depth 1
        self._index: dict[str, int] = {}
        self._free = list(range(len(self._tables)))
        self._decoded = np.zeros(num_blocks, dtype=bool)
        self._blocks = StepBlocks(BlockOffer())
        self._taken: dict[str, list[TakenBlock]] = {}

    def begin_step(self, offer: BlockOffer) -> None:
        """`offer`: blocks that may be taken until the next call."""
        self._blocks = StepBlocks(offer)
        self._taken = {}

    @property
    def taken(self) -> dict[str, list[TakenBlock]]:
        """What sequences took in this step."""
        return self._taken

    def add(self, request_id: str, block_ids: BlockIds, cached: int) -> tuple[list[int], list[int]]:
        """Takes a sequence in. Its blocks above depth 1 come from the prefix cache, and so do those
        of the first `cached` positions at depth 1.

        Returns how many positions were found at each depth, and how many of those are decoded.
        """
        if not self._free:
            self._free = list(range(len(self._tables), 2 * len(self._tables)))
            self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)])
        self._index[request_id] = index = self._free.pop()
        table = self._tables[index]
        table[:] = 0
        for row, ids in zip(table, block_ids, strict=True):
            row[: len(ids)] = ids
        self._at_first[request_id] = len(block_ids[0])
        self._decoded[block_ids[0][cached // self.block_size :]] = False
        found = [cached, *(len(ids) * self.block_size for ids in block_ids[1:])]
        leading = np.logical_and.accumulate(self._decoded[table], axis=1).sum(axis=1)
        return found, [int(blocks) * self.block_size for blocks in leading]

    def append(self, request_id: str, block_ids: Sequence[int]) -> None:
        """Adds blocks of depth 1 at the end."""
        start = self._at_first[request_id]
        end = self._at_first[request_id] = start + len(block_ids)
        self._tables[self._index[request_id], 0, start:end] = block_ids
        self._decoded[block_ids] = False

    def missing(self, rows: Rows) -> list[tuple[int, int]]:
        """Depth and column of the blocks that `rows` have yet to get, in the order of positions."""
        table = self._tables[self._index[rows.sequence.request_id]]
        first, last = rows.start // self.block_size, (rows.end - 1) // self.block_size
        depths = [rows.depth]
        if rows.newest and rows.sequence.writes_through:
            depths = list(range(rows.depth, rows.sequence.max_depth + 1))
        return [
            (depth, column)
            for column in range(first, last + 1)
            for depth in depths
            if not table[depth - 1, column]
        ]

    def missing_at(self, sequence: LoopedSequence, position: int) -> int:
        """How many of the planes above depth 1 have no block for a position."""
        column = position // self.block_size
        table = self._tables[self._index[sequence.request_id], 1 : sequence.max_depth]
        return int((table[:, column] == 0).sum()) if column < table.shape[1] else 0

    def make_room(self, rows: Rows) -> int:
        """See `StepExecutor`."""
        name = rows.sequence.request_id
        missing = self.missing(rows)
        available = self._blocks.available(name)
        end = rows.end
        if len(missing) > available:
            short = missing[available][1]  # the first column that does not get all it needs
            missing = [block for block in missing[:available] if block[1] < short]
            end = max(rows.start, short * self.block_size)
        for depth, column in missing:
            block_id = self._blocks.take(name)
            self._tables[self._index[name], depth - 1, column] = block_id
            self._decoded[block_id] = False
            self._taken.setdefault(name, []).append(TakenBlock(depth, column, block_id))
        return end - rows.start

    def remove(self, request_id: str) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        if (index := self._index.pop(request_id, None)) is not None:
            del self._at_first[request_id]
            self._free.append(index)

    def mark_decoded(self, rows: Rows) -> None:
        """Notes the blocks that the decoder has completed with `rows`."""
        first, last = rows.start // self.block_size, rows.end // self.block_size
        if first < last:
            table = self._tables[self._index[rows.sequence.request_id], rows.depth - 1]
            # The first block counts when the decoder had done it up to `start` before: it had, for
            # it goes through the positions in order.
            self._decoded[table[first:last]] = True

    def blocks(self, request_id: str) -> NDArray[np.int64]:
        """Ids of all blocks of a sequence."""
        table = self._tables[self._index[request_id]]
        return table[table > 0].astype(np.int64)

    def layout(self, batch: Sequence[Rows]) -> "BatchLayout":
        """Positions and tables of a batch of rows."""
        sequence = np.array([self._index[rows.sequence.request_id] for rows in batch])
        starts = np.array([rows.start for rows in batch])
        ends = np.array([rows.end for rows in batch])
        lengths = ends - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        entry = np.repeat(np.arange(len(batch)), lengths)
        positions = np.arange(offsets[-1]) - offsets[:-1][entry] + starts[entry]
        return BatchLayout(
            tables=self._tables,
            block_size=self.block_size,
            sequence=sequence,
            depth=np.array([rows.depth for rows in batch]),
            ends=ends,
            offsets=offsets,
            entry=entry,
            positions=positions,
        )


@dataclass
class BatchLayout:
    """Where the rows of a batch lie. E entries (chunks), T rows."""

    tables: NDArray[np.int32]  # of all sequences [S, N, blocks]
    block_size: int
    sequence: NDArray[np.int64]  # [E]
    depth: NDArray[np.int64]  # [E], from 1
    ends: NDArray[np.int64]  # [E]: sequence length as the entry sees it
    offsets: NDArray[np.int64]  # [E + 1]: first row of each entry
    entry: NDArray[np.int64]  # [T]
    positions: NDArray[np.int64]  # [T]

    @cached_property
    def own_slots(self) -> NDArray[np.int64]:
        """Slot of every row [T] at its own depth."""
        return self.slots(self.depth)

    def slots(self, depth: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slot of every row [T] in the plane of its entry's `depth` [E]."""
        return self._slots(self.sequence[self.entry], depth[self.entry], self.positions)

    def _slots(
        self, sequence: NDArray[Any], depth: NDArray[Any], positions: NDArray[Any]
    ) -> NDArray[np.int64]:
        blocks = self.tables[sequence, depth - 1, positions // self.block_size]
        return blocks.astype(np.int64) * self.block_size + positions % self.block_size

    def through(
        self, entries: NDArray[np.int64], deepest: NDArray[np.int64], deeper_only: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Last rows of `entries`, and slots of their positions at deeper depths, or at all others,
        down to the `deepest` of each: a row for each slot [M]."""
        depths = np.arange(1, self.tables.shape[1] + 1)
        own = self.depth[entries][:, None]
        others = depths > own if deeper_only else depths != own
        entry, column = np.nonzero(others & (depths <= deepest[:, None]))
        chosen = entries[entry]
        rows = self.last_rows[chosen]
        return rows, self._slots(self.sequence[chosen], depths[column], self.positions[rows])

    def block_table(self) -> NDArray[np.int32]:
        """Block ids [E, blocks] of each entry at its depth, as many as the longest needs."""
        width = cdiv(int(self.ends.max()), self.block_size)
        return np.ascontiguousarray(self.tables[self.sequence, self.depth - 1, :width])

    @property
    def last_rows(self) -> NDArray[np.int64]:
        """Index of each entry's last row [E]."""
        return self.offsets[1:] - 1


class StatePages:
    """States `h^r` in K/V-sized pages: reads and writes them by slot.

    `pages`: [num_blocks, kv_heads, block_size, 2 * head_size] each, in whatever order the attention
    backend has the inside of a block. The memory of a block is taken as `block_size` rows of
    `kv_heads * 2 * head_size` numbers; a state is cut into pieces, one a page.
    """

    def __init__(self, pages: list[torch.Tensor], hidden_size: int) -> None:
        """Raises `ValueError` for a layout that scatters a block over memory."""
        self._rows: list[torch.Tensor] = []
        self._widths: list[int] = []
        left = hidden_size
        for page in pages:
            rows = _rows_of_blocks(page)
            self._widths.append(min(left, rows.shape[-1]))
            self._rows.append(rows.narrow(-1, 0, self._widths[-1]))
            left -= self._widths[-1]
        assert left == 0, "the pages do not hold a state"

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots [T] -> states [T, H]."""
        pieces = [
            rows.index_select(0, slots) if rows.dim() == 2 else rows[_split(slots, rows)]
            for rows in self._rows
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def write(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """States [T, H] to slots [T]."""
        for rows, piece in zip(self._rows, states.split(self._widths, dim=1), strict=True):
            if rows.dim() == 2:
                rows.index_copy_(0, slots, piece.to(rows.dtype))
            else:
                rows[_split(slots, rows)] = piece.to(rows.dtype)


def _rows_of_blocks(page: torch.Tensor) -> torch.Tensor:
    """The memory of a layer's blocks as rows: [slots, numbers], or [num_blocks, block_size,
    numbers] where other layers' blocks lie between them."""
    blocks, heads, size, width = page.shape
    numbers = heads * width
    reach = sum((n - 1) * step for n, step in zip(page.shape[1:], page.stride()[1:], strict=True))
    if reach != size * numbers - 1:
        raise ValueError(
            "VLLM_KV_CACHE_LAYOUT must keep the K/V of a block together for LoopUS models "
            f"(LBNHC, LBHNC, BLNHC or BLHNC); strides are {page.stride()}"
        )
    if page.stride(0) == size * numbers:
        return page.as_strided((blocks * size, numbers), (numbers, 1))
    return page.as_strided((blocks, size, numbers), (page.stride(0), numbers, 1))


def _split(slots: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return slots // rows.shape[1], slots % rows.shape[1]
