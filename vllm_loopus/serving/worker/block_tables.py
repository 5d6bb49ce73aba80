"""Block tables of running sequences, by depth."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from vllm.utils.math_utils import cdiv

from vllm_loopus.serving.messages.blocks import BlockIds, BlockOffer, TakenBlock
from vllm_loopus.serving.step.staircase import Chunk, LoopedSequence
from vllm_loopus.serving.worker.row_layout import RowLayout, Spans, slots_of
from vllm_loopus.serving.worker.step_blocks import StepBlocks


class BlockTables:
    """Block tables of all running sequences: [sequence, depth, column] -> block id, 0 for none.

    Planes from depth 2 on get their blocks in `make_room`, from the offer of the step. The tables
    also remember which blocks the decoder has gone through, for those that are found again in the
    prefix cache: a cached block is complete except for the decoder's K/V.
    """

    def __init__(self, num_depths: int, max_blocks: int, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._tables = np.zeros((8, num_depths, max_blocks), dtype=np.int32)
        self._at_first: dict[str, int] = {}  # number of blocks of depth 1
        self._index: dict[str, int] = {}
        self._unused = list(range(len(self._tables)))
        self._decoded = np.zeros(num_blocks, dtype=bool)
        self._blocks = StepBlocks(BlockOffer())
        self._taken: dict[str, list[TakenBlock]] = {}
        self._spans: Spans | None = None  # of the last layout

    def begin_step(self, offer: BlockOffer) -> None:
        """`offer`: the blocks that may be taken until the next call."""
        self._blocks = StepBlocks(offer)
        self._taken = {}

    @property
    def taken(self) -> dict[str, list[TakenBlock]]:
        """What sequences have taken in this step."""
        return self._taken

    def add(self, request_id: str, block_ids: BlockIds, cached: int) -> tuple[list[int], list[int]]:
        """Adds a sequence. Its blocks from depth 2 on come from the prefix cache, and so do those
        of the first `cached` positions at depth 1.

        Returns how many positions were found at each depth, and how many of those are decoded.
        """
        if not self._unused:
            self._unused = list(range(len(self._tables), 2 * len(self._tables)))
            self._tables = np.concatenate([self._tables, np.zeros_like(self._tables)])
        self._index[request_id] = index = self._unused.pop()
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
        """Adds blocks of depth 1 at the end of a sequence."""
        start = self._at_first[request_id]
        end = self._at_first[request_id] = start + len(block_ids)
        self._tables[self._index[request_id], 0, start:end] = block_ids
        self._decoded[block_ids] = False

    def remove(self, request_id: str) -> None:
        """Forgets a sequence; unknown ones are ignored."""
        if (index := self._index.pop(request_id, None)) is not None:
            del self._at_first[request_id]
            self._unused.append(index)

    def missing(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Depth and column of the blocks that a chunk lacks, in the order of positions."""
        table = self._tables[self._index[chunk.sequence.request_id]]
        depths = [chunk.depth]
        if chunk.newest and chunk.sequence.copies_on_exit:
            depths = list(range(chunk.depth, chunk.sequence.max_depth + 1))
        first, end = self._columns(chunk)
        return [
            (depth, column)
            for column in range(first, end)
            for depth in depths
            if not table[depth - 1, column]
        ]

    def missing_at(self, sequence: LoopedSequence, position: int) -> int:
        """How many of the planes from depth 2 on have no block for a position."""
        column = position // self.block_size
        table = self._tables[self._index[sequence.request_id], 1 : sequence.max_depth]
        return int((table[:, column] == 0).sum()) if column < table.shape[1] else 0

    def make_room(self, chunk: Chunk) -> int:
        """See `StepExecutor`."""
        name = chunk.sequence.request_id
        missing = self.missing(chunk)
        available = self._blocks.available(name)
        end = chunk.end
        if len(missing) > available:
            short = missing[available][1]  # the first column that does not get all it needs
            missing = [block for block in missing[:available] if block[1] < short]
            end = max(chunk.start, short * self.block_size)
        for depth, column in missing:
            block_id = self._blocks.take(name)
            self._tables[self._index[name], depth - 1, column] = block_id
            self._decoded[block_id] = False
            self._taken.setdefault(name, []).append(TakenBlock(depth, column, block_id))
        return end - chunk.start

    def make_room_deeper(self, chunks: Sequence[Chunk], passes: int) -> int:
        """See `StepExecutor`."""
        if all(self._has_deeper_blocks(chunk, passes) for chunk in chunks):
            return passes
        eldest_first = sorted(chunks, key=lambda chunk: -chunk.sequence.age)
        for further in range(1, passes):
            for chunk in eldest_first:
                deeper = Chunk(chunk.sequence, chunk.depth + further, chunk.start, chunk.end)
                if self.make_room(deeper) < len(deeper):
                    return further
        return passes

    def _has_deeper_blocks(self, chunk: Chunk, passes: int) -> bool:
        table = self._tables[self._index[chunk.sequence.request_id]]
        columns = slice(*self._columns(chunk))
        return bool(table[chunk.depth : chunk.depth + passes - 1, columns].all())

    def _columns(self, chunk: Chunk) -> tuple[int, int]:
        """The first column of a table that a chunk lies in, and the one after the last."""
        return chunk.start // self.block_size, cdiv(chunk.end, self.block_size)

    def mark_decoded(self, chunk: Chunk) -> None:
        """Notes the blocks that the decoder has completed with a chunk."""
        first, last = chunk.start // self.block_size, chunk.end // self.block_size
        if first < last:
            table = self._tables[self._index[chunk.sequence.request_id], chunk.depth - 1]
            # The first block counts if the decoder had done it up to `start` before. It had, since
            # it goes through the positions in order.
            self._decoded[table[first:last]] = True

    def blocks(self, request_id: str) -> NDArray[np.int64]:
        """The ids of all blocks of a sequence."""
        table = self._tables[self._index[request_id]]
        return table[table > 0].astype(np.int64)

    def layout(self, chunks: Sequence[Chunk]) -> RowLayout:
        """Where the rows of chunks lie."""
        return self.layouts(chunks, 1)[0]

    def layouts(self, chunks: Sequence[Chunk], passes: int) -> list[RowLayout]:
        """Of passes over the same positions, one depth deeper each; `chunks` are at the depths of
        the last."""
        places = [(self._index[c.sequence.request_id], c.start, c.end) for c in chunks]
        # While no sequence exits or joins, a pass has the positions of the one before.
        if self._spans is None or self._spans.chunks != places:
            self._spans = Spans.of(places, self.block_size)
        spans = self._spans
        depths = np.array([chunk.depth for chunk in chunks]) + np.arange(1 - passes, 1)[:, None]
        blocks = self._tables[spans.sequence, depths - 1, : spans.max_blocks]
        slots = slots_of(blocks[:, spans.chunk, spans.column], spans.within, self.block_size)
        of_passes = zip(depths, blocks, slots, strict=True)
        return [RowLayout(self._tables, spans, *of_pass) for of_pass in of_passes]
