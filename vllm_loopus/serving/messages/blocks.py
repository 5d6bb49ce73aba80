"""K/V blocks of deeper planes: what the scheduler offers and what the worker took.

A sequence gets its blocks of depth 1 from the scheduler. Its exit depth is only known inside a
step, so the worker gives it blocks of deeper planes in the pass that needs them, from the free
blocks that the scheduler offered for the step. Afterwards the scheduler books the blocks that were
taken. So a block is only in use while it holds a position. All ranks decide from the same data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BlockIds = Sequence[Sequence[int]]  # one list for each KV cache group, that is, for each depth


@dataclass(frozen=True)
class BlockOffer:
    """What a step may take: ids of `free` blocks, in the order in which they are to be taken.
    Each sequence is guaranteed as many of them as are `promised` to it."""

    free: Sequence[int] = ()
    promised: dict[str, int] = field(default_factory=dict)


class TakenBlock(NamedTuple):
    """The worker has put `block_id` into `column` of a sequence's block table at `depth`."""

    depth: int
    column: int
    block_id: int
