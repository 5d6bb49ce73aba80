"""States deeper than the last plane (`kv_planes` `last:m`), which only their own position needs.

They are kept while the position is in flight, beside the paged memory: one at each such depth, for
each position that a sequence may have in flight. A pass may be launched over a position that has
exited, so the state that it exited with must stay. A prompt that is scored has all its positions in
flight at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_loopus.serving.step.chunks import Ints
from vllm_loopus.serving.worker.row_layout import RowLayout
from vllm_loopus.serving.worker.states import StatePages
from vllm_loopus.serving.worker.transfer import to_device

SHARED = -1  # the store of all sequences whose prompts are not scored


@dataclass(frozen=True)
class Places:
    """Where the states of the T rows of a call lie.

    - `slots` [T]: in the pages. `paged` [P]: the rows that are there; None for all.
    - `elsewhere`: of the other rows, store by store: the store, rows and places in it.
    """

    slots: torch.Tensor
    paged: torch.Tensor | None = None
    elsewhere: tuple[tuple[int, torch.Tensor, torch.Tensor], ...] = ()


class DepthStates:
    """The states of all depths: those up to the last plane in `pages`."""

    def __init__(
        self, pages: StatePages, size: int, positions: int, depths: int, device: torch.device
    ) -> None:
        """`size`: numbers of a state. `positions`: those of a sequence in flight. `depths`: those
        beyond the last plane."""
        self._pages = pages
        self._size = size
        self._device = device
        self._positions = positions
        self._depths = depths
        self._stores = {SHARED: pages.empty(0, size)}

    def add(self, index: int, scored: int) -> None:
        """A sequence gets the row `index`. `scored`: positions of its prompt if it is scored."""
        if not self._depths:
            return
        self._stores.pop(index, None)
        if scored:
            self._stores[index] = self._pages.empty(scored * self._depths, self._size)
        shared = self._stores[SHARED]
        if (more := (index + 1) * self._positions * self._depths - len(shared)) > 0:
            more = max(more, len(shared))  # twice as many: rows are added one by one
            self._stores[SHARED] = torch.cat([shared, self._pages.empty(more, self._size)])

    def places(self, layout: RowLayout, depth: NDArray[np.int64]) -> Places:
        """Of the rows of a call, at the `depth` [C] given for each chunk."""
        slots = to_device(layout.slots(depth), self._device)
        beyond = depth > layout.planes
        if not beyond.any():
            return Places(slots)
        spans = layout.spans
        deep = beyond[spans.chunk]
        sequence, position = spans.sequence[spans.chunk], spans.positions
        further = (depth - layout.planes - 1)[spans.chunk]
        elsewhere, shared = [], deep.copy()
        for index in self._stores.keys() & set(spans.sequence[beyond].tolist()):
            scored = len(self._stores[index]) // self._depths
            rows = np.flatnonzero(deep & (sequence == index) & (position < scored))
            shared[rows] = False
            elsewhere.append(self._at(index, rows, position[rows], further))
        rows = np.flatnonzero(shared)
        at = sequence[rows] * self._positions + position[rows] % self._positions
        elsewhere.append(self._at(SHARED, rows, at, further))
        paged = to_device(np.flatnonzero(~deep), self._device)
        return Places(slots, paged, tuple(found for found in elsewhere if len(found[1])))

    def own_places(self, layout: RowLayout, slots: torch.Tensor) -> Places:
        """Of the rows of a call at its own depths, whose `slots` are on the device."""
        if (layout.depth > layout.planes).any():
            return self.places(layout, layout.depth)
        return Places(slots)

    def _at(
        self, store: int, rows: Ints, at: Ints, further: Ints
    ) -> tuple[int, torch.Tensor, torch.Tensor]:
        places = at * self._depths + further[rows]
        return store, to_device(rows, self._device), to_device(places, self._device)

    def read(self, places: Places) -> torch.Tensor:
        """The states [T, H]."""
        states = self._pages.read(places.slots)
        for store, rows, at in places.elsewhere:
            states = states.index_copy(0, rows, self._stores[store].index_select(0, at))
        return states

    def write(self, places: Places, states: torch.Tensor) -> None:
        """States [T, H] of rows with different positions or depths."""
        if places.paged is None:
            self._pages.write(places.slots, states)
            return
        if len(places.paged):
            slots = places.slots.index_select(0, places.paged)
            self._pages.write(slots, states.index_select(0, places.paged))
        for store, rows, at in places.elsewhere:
            chosen = states.index_select(0, rows)
            self._stores[store].index_copy_(0, at, chosen.to(self._stores[store].dtype))
