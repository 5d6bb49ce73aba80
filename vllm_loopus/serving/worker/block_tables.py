"""Block tables of running sequences, by depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_loopus.serving.messages.blocks import BlockIds
from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints
from vllm_loopus.serving.worker.row_layout import RowLayout, Spans, slots_of
from vllm_loopus.serving.worker.step_blocks import StepBlocks


@dataclass(frozen=True, eq=False)
class Taken:
    """Blocks [M] that sequences took: `block` is now at [sequence, depth - 1, column]."""

    sequence: Ints
    depth: Ints
    column: Ints
    block: Ints


@dataclass(frozen=True, eq=False)
class _Places:
    """Columns of block tables [M]: what the chunks `owner` [M] need, in the order of chunks, of
    positions, of depths."""

    owner: Ints
    sequence: Ints
    depth: Ints
    column: Ints


class BlockTables:
    """Block tables of all running sequences: [sequence, depth - 1, column] -> block id, 0 for none.
    `num_depths` have K/V of their own; deeper rows read that of the last one and write none.
    A sequence has the same row here and in `Staircases`.

    Planes from depth 2 on get their blocks in `make_room`, from the offer of the step. The tables
    also remember which blocks the decoder has gone through, for those that are found again in the
    prefix cache: a cached block is complete except for the decoder's K/V.
    """

    def __init__(self, num_depths: int, max_blocks: int, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_depths = num_depths
        self._tables = np.zeros((8, num_depths, max_blocks), dtype=np.int32)
        self._at_first = np.zeros(8, dtype=np.int64)  # number of blocks of depth 1
        self._decoded = np.zeros(num_blocks, dtype=bool)
        self._suspect = np.zeros(num_blocks, dtype=np.int64)  # call that may have left NaN there
        self._oldest = 1  # call that has not been read
        self._suspect_given = 0  # the newest call that may have left NaN in a block given out
        self._blocks = StepBlocks.none()
        self._taken: list[Taken] = []
        self._spans: Spans | None = None  # of the last layout

    def reserve(self, rows: int) -> None:
        """Makes room for as many sequences."""
        if (more := rows - len(self._tables)) > 0:
            grown = np.zeros((more, *self._tables.shape[1:]), dtype=np.int32)
            self._tables = np.concatenate([self._tables, grown])
            self._at_first = np.concatenate([self._at_first, np.zeros(more, dtype=np.int64)])

    def begin_step(self, free: Sequence[int], promised: Mapping[int, int]) -> None:
        """`free`: the blocks that may be taken until the next call; `promised`: how many of them
        are kept for a sequence."""
        kept = np.zeros(len(self._tables), dtype=np.int64)
        for index, count in promised.items():
            kept[index] = count
        self._blocks = StepBlocks(np.array(free, dtype=np.int64), kept)
        self._taken = []

    @property
    def taken(self) -> list[Taken]:
        """What sequences have taken in this step."""
        return self._taken

    def add(self, index: int, block_ids: BlockIds, cached: int) -> tuple[list[int], list[int]]:
        """Adds a sequence. Its blocks from depth 2 on come from the prefix cache, and so do those
        of the first `cached` positions at depth 1.

        Returns how many positions were found at each depth, and how many of those are decoded.
        """
        table = self._tables[index]
        table[:] = 0
        for ids in block_ids:
            self._give(ids)
        for row, ids in zip(table, block_ids, strict=True):
            row[: len(ids)] = ids
        self._at_first[index] = len(block_ids[0])
        self._decoded[block_ids[0][cached // self.block_size :]] = False
        found = [cached, *(len(ids) * self.block_size for ids in block_ids[1:])]
        leading = np.logical_and.accumulate(self._decoded[table], axis=1).sum(axis=1)
        return found, [int(blocks) * self.block_size for blocks in leading]

    def append(self, index: int, block_ids: Sequence[int]) -> None:
        """Adds blocks of depth 1 at the end of a sequence."""
        start = self._at_first[index]
        end = self._at_first[index] = start + len(block_ids)
        self._give(block_ids)
        self._tables[index, 0, start:end] = block_ids
        self._decoded[block_ids] = False

    def suspect(self, index: int, call: int) -> None:
        """Blocks of a sequence that has ended may hold NaN until `call`, the newest one over it,
        has been read; calls are numbered from 1."""
        self._suspect[self.blocks(index)] = call

    def trust(self, oldest: int) -> None:
        """All calls before `oldest` have been read."""
        self._oldest = oldest

    @property
    def suspects_in_use(self) -> bool:
        """Whether a block has been given out in which a call that has not been read may have left
        NaN."""
        return self._suspect_given >= self._oldest

    def _give(self, blocks: Sequence[int] | Ints) -> None:
        if len(blocks):
            self._suspect_given = max(self._suspect_given, int(self._suspect[blocks].max()))

    def room_at_first(self, sequences: Ints, position: Ints) -> Bools:
        """Whether there is a block of depth 1 for a position of each sequence."""
        return position < self.positions_at_first(sequences)

    def positions_at_first(self, sequences: Ints) -> Ints:
        """How many positions of each sequence have blocks of depth 1 [S]."""
        return self._at_first[sequences] * self.block_size

    def forget(self, sequences: Ints, position: Ints, count: int) -> None:
        """The `count` positions of each sequence from `position` on are forgotten: the blocks that
        they are in are not decoded."""
        for column in range(count // self.block_size + 2):
            at = np.minimum(position // self.block_size + column, self._tables.shape[2] - 1)
            self._decoded[self._tables[sequences, :, at]] = False
        self._decoded[0] = False

    def affordable(self, sequences: Ints, counts: Ints) -> Bools:
        """Which of `sequences` can have `counts` blocks each of what is left in the offer, the
        first ones first."""
        if self._blocks.enough_for_all(int(counts.sum())):
            return np.ones(len(sequences), dtype=bool)
        left, chosen = self._blocks.left(), np.zeros(len(sequences), dtype=bool)
        for at, (index, count) in enumerate(zip(sequences.tolist(), counts.tolist(), strict=True)):
            if count <= left.available(index):
                left.take(np.full(count, index))
                chosen[at] = True
        return chosen

    def _needed(self, chunks: Chunks, deepest: Ints | None) -> _Places:
        """Where chunks need blocks. `deepest`: up to which depth those that are copied when they
        exit need them; None if none is."""
        first, last = chunks.start // self.block_size, (chunks.end - 1) // self.block_size
        columns = last - first + 1
        own = self._plane(chunks.depth)
        depths = np.ones_like(first) if deepest is None else self._plane(deepest) - own + 1
        counts = columns * depths
        if (counts == 1).all():
            return _Places(np.arange(len(chunks)), chunks.sequence, own, first)
        owner = np.arange(len(chunks)).repeat(counts)
        number = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
        column, depth = np.divmod(number, depths[owner])
        return _Places(owner, chunks.sequence[owner], own[owner] + depth, first[owner] + column)

    def _plane(self, depth: Ints) -> Ints:
        """The depth whose plane is read at `depth`."""
        return np.minimum(depth, self.num_depths)

    def _missing(self, places: _Places) -> Bools:
        return self._tables[places.sequence, places.depth - 1, places.column] == 0

    def missing(self, chunks: Chunks, deepest: Ints | None = None) -> Ints:
        """How many blocks each chunk lacks [C]. `deepest`: see `make_room`."""
        places = self._needed(chunks, deepest)
        missing = self._missing(places)
        return np.bincount(places.owner[missing], minlength=len(chunks))

    def missing_deeper(self, sequences: Ints, position: Ints, deepest: Ints) -> Ints:
        """How many of the planes from depth 2 to `deepest` have no block for a position of each
        sequence."""
        column = np.minimum(position // self.block_size, self._tables.shape[2] - 1)
        empty = self._tables[sequences, :, column] == 0
        empty[:, 0] = False
        empty &= np.arange(1, self.num_depths + 1) <= deepest[:, None]
        inside = position < self._tables.shape[2] * self.block_size
        return np.where(inside, empty.sum(axis=1), 0)

    def make_room(self, chunks: Chunks, deepest: Ints | None = None) -> Ints:
        """How many positions of each chunk, from the first, have blocks [C]; takes new blocks.

        `deepest` [C]: up to which depth a chunk whose newest position is copied when it exits
        needs blocks, otherwise its own depth; None if none is copied.
        """
        places = self._needed(chunks, deepest)
        missing = np.flatnonzero(self._missing(places))
        room = chunks.sizes
        if not len(missing):
            return room
        if not self._blocks.enough_for_all(len(missing)):
            missing, room = self._affordable(chunks, places, missing, room)
            if not len(missing):
                return room
        sequence = places.sequence[missing]
        depth, column = places.depth[missing], places.column[missing]
        block = self._blocks.take(sequence)
        self._give(block)
        self._tables[sequence, depth - 1, column] = block
        self._decoded[block] = False
        self._taken.append(Taken(sequence, depth, column, block))
        return room

    def _affordable(
        self, chunks: Chunks, places: _Places, missing: Ints, room: Ints
    ) -> tuple[Ints, Ints]:
        """Which of the `missing` places get a block where there are not enough, chunk by chunk, and
        how many positions of each chunk have room then."""
        taking, room = [], room.copy()
        stopped: set[int] = set()  # sequences with a chunk that lacks blocks
        left = self._blocks.left()
        for owner in np.unique(places.owner[missing]):
            index = int(chunks.sequence[owner])
            own = missing[places.owner[missing] == owner]
            available = left.available(index) if index not in stopped else 0
            if len(own) > available:
                stopped.add(index)
                # The first column that does not get all it needs.
                short = int(places.column[own[available]])
                own = own[:available]
                own = own[places.column[own] < short]
                end = max(int(chunks.start[owner]), short * self.block_size)
                room[owner] = end - int(chunks.start[owner])
            left.take(np.full(len(own), index))
            taking.append(own)
        return np.concatenate(taking), room

    def make_room_deeper(self, chunks: Chunks, passes: int) -> int:
        """How many of the next `passes` every chunk has blocks for; takes new blocks from the
        second pass on. The first pass is at the depths of the chunks, each later one a depth
        deeper."""
        for further in range(1, passes):
            deeper = chunks.deeper(further)
            if (self.make_room(deeper) < deeper.sizes).any():
                return further
        return passes

    def mark_decoded(self, chunks: Chunks) -> None:
        """Notes the blocks that the decoder has completed with chunks."""
        chunks = chunks[chunks.depth <= self.num_depths]  # deeper ones have left no K/V
        first, last = chunks.start // self.block_size, chunks.end // self.block_size
        if not (first < last).any():
            return
        counts = last - first
        owner = np.arange(len(chunks)).repeat(counts)
        column = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner] + first[owner]
        # The first block counts if the decoder had done it up to `start` before. It had, since it
        # goes through the positions in order.
        blocks = self._tables[chunks.sequence[owner], chunks.depth[owner] - 1, column]
        self._decoded[blocks] = True

    def blocks(self, index: int) -> NDArray[np.int64]:
        """The ids of all blocks of a sequence."""
        table = self._tables[index]
        return table[table > 0].astype(np.int64)

    def layout(self, chunks: Chunks) -> RowLayout:
        """Where the rows of chunks lie."""
        return self.layouts(chunks, 1)[0]

    def layouts(self, chunks: Chunks, passes: int) -> list[RowLayout]:
        """Of passes over the same positions, one depth deeper each; `chunks` are at the depths of
        the last."""
        # While no sequence exits or joins, a pass has the positions of the one before.
        if self._spans is None or not self._spans.are(chunks):
            self._spans = Spans.of(chunks, self.block_size)
        spans = self._spans
        layouts = []
        for earlier in range(passes - 1, -1, -1):
            depth = chunks.depth - earlier
            blocks = self._tables[spans.sequence, self._plane(depth) - 1, : spans.max_blocks]
            own = blocks[spans.chunk, spans.column]
            slots = slots_of(own, spans.within, self.block_size)
            if (beyond := depth > self.num_depths).any():
                slots = np.where(beyond[spans.chunk], -1, slots)
            layouts.append(RowLayout(self._tables, spans, depth, blocks, slots))
        return layouts
