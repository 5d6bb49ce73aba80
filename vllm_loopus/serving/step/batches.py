"""What the next pass computes: who gets rows and blocks if there are not enough for all."""

import numpy as np

from vllm_loopus.serving.step.chunks import Chunks, Ints, shares
from vllm_loopus.serving.step.interface import StepExecutor
from vllm_loopus.serving.step.report import StepReport
from vllm_loopus.serving.step.staircase import Staircases


def next_batch(
    stairs: Staircases, executor: StepExecutor, active: Ints, row_budget: int, report: StepReport
) -> tuple[Chunks, bool]:
    """What the next pass over the sequences `active` computes, and whether that is all that is
    wanted. Takes the blocks for it.

    New positions come first and are never deferred, because `h^0` is not stored.
    """
    wanted = stairs.next_chunks(active[np.argsort(-stairs.age[active], kind="stable")])
    if not len(wanted):
        return wanted, True
    new = wanted.depth == 1
    fresh = wanted[new]
    budget = row_budget - fresh.rows
    assert budget >= 0, "new positions exceed the row budget"
    if len(fresh):
        room = executor.make_room(fresh)
        assert (room == fresh.sizes).all(), "blocks of new positions are promised"
        if len(fresh) == len(wanted):
            return fresh, True
    deeper = wanted[~new] if len(fresh) else wanted
    granted = within(deeper, budget)
    room = executor.make_room(granted) if len(granted) else granted.sizes
    short = room < granted.sizes
    if short.any():
        # What comes after a chunk that is cut attends to all of it.
        behind = np.zeros(len(granted), dtype=bool)
        behind[1:] = (granted.sequence[1:] == granted.sequence[:-1]) & short[:-1]
        room, short = np.where(behind, 0, room), short | behind
        report.stalled += int(short.sum())
    stairs.stalled[granted.sequence] = short
    batch = Chunks.join([fresh, granted.cut(room)])
    return batch, batch.rows == wanted.rows


def within(chunks: Chunks, budget: int) -> Chunks:
    """Of chunks, the first rows of each sequence, up to its share of `budget`."""
    sizes = chunks.sizes
    if int(sizes.sum()) <= budget:
        return chunks
    first = np.ones(len(chunks), dtype=bool)
    first[1:] = chunks.sequence[1:] != chunks.sequence[:-1]
    owner = np.cumsum(first) - 1
    wanted = np.bincount(owner, weights=sizes).astype(np.int64)
    share = shares(wanted, budget)[owner]
    before = np.cumsum(sizes) - sizes
    before -= before[first][owner]  # rows of the sequence before this chunk
    return chunks.cut(np.clip(share - before, 0, sizes))
