"""Block tables of running sequences, by depth."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from vllm.utils.math_utils import cdiv

from vllm_loopus.serving.batch_layout import BatchLayout, Spans, slots_of
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
        self._spans: Spans | None = None  # of the last layout

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
        depths = [rows.depth]
        if rows.newest and rows.sequence.writes_through:
            depths = list(range(rows.depth, rows.sequence.max_depth + 1))
        first, end = self._columns(rows)
        return [
            (depth, column)
            for column in range(first, end)
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

    def make_room_below(self, batch: Sequence[Rows], passes: int) -> int:
        """See `StepExecutor`."""
        if all(self._has_blocks_below(rows, passes) for rows in batch):
            return passes
        eldest_first = sorted(batch, key=lambda rows: -rows.sequence.age)
        for deeper in range(1, passes):
            for rows in eldest_first:
                below = Rows(rows.sequence, rows.depth + deeper, rows.start, rows.end)
                if self.make_room(below) < len(below):
                    return deeper
        return passes

    def _has_blocks_below(self, rows: Rows, passes: int) -> bool:
        table = self._tables[self._index[rows.sequence.request_id]]
        return bool(table[rows.depth : rows.depth + passes - 1, slice(*self._columns(rows))].all())

    def _columns(self, rows: Rows) -> tuple[int, int]:
        """The first column of a table that `rows` lie in, and the one after the last."""
        return rows.start // self.block_size, cdiv(rows.end, self.block_size)

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

    def layout(self, batch: Sequence[Rows]) -> BatchLayout:
        """Positions and tables of a batch of rows."""
        return self.layouts(batch, 1)[0]

    def layouts(self, batch: Sequence[Rows], passes: int) -> list[BatchLayout]:
        """Of passes over the same positions, a depth deeper each; `batch` is at the depths of the
        last."""
        chunks = [(self._index[rows.sequence.request_id], rows.start, rows.end) for rows in batch]
        # While nobody leaves or joins, a pass has the chunks of the one before.
        if self._spans is None or self._spans.chunks != chunks:
            self._spans = Spans.of(chunks, self.block_size)
        spans = self._spans
        depths = np.array([rows.depth for rows in batch]) + np.arange(1 - passes, 1)[:, None]
        blocks = self._tables[spans.sequence, depths - 1, : spans.max_blocks]
        slots = slots_of(blocks[:, spans.entry, spans.column], spans.within, self.block_size)
        places = zip(depths, blocks, slots, strict=True)
        return [BatchLayout(self._tables, spans, *of_pass) for of_pass in places]
