"""Chunks: which positions of which sequences a model call computes, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Chunks:
    """C chunks: positions `start .. end - 1` of a sequence, to be computed at `depth` as one causal
    chunk. Each position is one row of the model call. All arrays are [C].

    - `sequence`: its index in `Staircases` and `BlockTables`. `depth`: 0 for the encoder.
    - `newest`: whether the chunk ends with the newest position of the sequence.
    """

    sequence: Ints
    depth: Ints
    start: Ints
    end: Ints
    newest: Bools

    @classmethod
    def none(cls) -> Self:
        """No chunk."""
        empty = np.zeros(0, dtype=np.int64)
        return cls(empty, empty, empty, empty, np.zeros(0, dtype=bool))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The chunks of all parts, in order."""
        full = [part for part in parts if len(part)]
        if len(full) == 1:
            return full[0]
        if not full:
            return cls.none()
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in full])
                for name in ("sequence", "depth", "start", "end", "newest")
            )
        )

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def sizes(self) -> Ints:
        """Rows of each chunk [C]."""
        return self.end - self.start

    @property
    def rows(self) -> int:
        """Rows of all chunks."""
        return int(self.sizes.sum())

    def __getitem__(self, chosen: Ints | Bools) -> Self:
        """Some of the chunks: a mask [C] or indices."""
        return replace(
            self,
            sequence=self.sequence[chosen],
            depth=self.depth[chosen],
            start=self.start[chosen],
            end=self.end[chosen],
            newest=self.newest[chosen],
        )

    def at(self, depth: Ints | int) -> Self:
        """The same positions at another depth."""
        return replace(self, depth=np.broadcast_to(np.asarray(depth), self.depth.shape))

    def deeper(self, passes: int) -> Self:
        """The same positions, `passes` depths deeper."""
        return replace(self, depth=self.depth + passes) if passes else self

    def split(self, split: Bools, at: Ints) -> Self:
        """Those of the mask `split` [C] as two: up to the position `at` [C], and the newest
        alone."""
        where, second = _repeated(split)
        first = np.zeros(len(where), dtype=bool)
        first[:-1] = second[1:]
        both = self[where]
        start = np.where(second, both.end - 1, both.start)
        end = np.where(first, at[where], both.end)
        return replace(both, start=start, end=end, newest=~first)

    def after(self, before: Self, where: Bools) -> Self:
        """Each chunk, and before it that of `before` [C] where the mask `where` [C] says so."""
        place = np.concatenate([np.flatnonzero(where), np.arange(len(where))])
        return self.join([before[where], self])[np.argsort(place, kind="stable")]

    def cut(self, rows: Ints) -> Self:
        """The first `rows` [C] of each chunk; chunks without a row are dropped."""
        if (rows >= self.sizes).all():
            return self
        end = np.minimum(self.end, self.start + rows)
        cut = replace(self, end=end, newest=self.newest & (end == self.end))
        return cut[rows > 0]


def _repeated(twice: Bools) -> tuple[Ints, Bools]:
    """The indices of the mask `twice` [C], those that it names two times; and which are second
    ones."""
    where = np.arange(len(twice)).repeat(1 + twice)
    second = np.zeros(len(where), dtype=bool)
    second[1:] = where[1:] == where[:-1]
    return where, second


def shares(wanted: Ints, budget: int) -> Ints:
    """How many rows each of n sequences gets, of those `wanted` [n]: at least an equal share of
    `budget`, if it wants as much; what is left over goes to the first ones."""
    if int(wanted.sum()) <= budget:
        return wanted
    base = np.minimum(wanted, budget // len(wanted))
    more = wanted - base
    left = budget - int(base.sum()) - (np.cumsum(more) - more)
    return base + np.clip(left, 0, more)
