"""K/V of a pass that is written to more slots once it is known which rows have exited."""

from typing import Any

import torch


class DeferredWrites:
    """The K/V of some rows of a pass, layer by layer, until it is written to deeper planes.

    It takes memory for as many rows as there are sequences; or, to avoid the copies, for all rows
    if those are at most `AT_ONCE` times as many.
    """

    AT_ONCE = 2

    def __init__(self, rows: torch.Tensor) -> None:
        """`rows` [M]: the rows that may be written, in ascending order."""
        self._rows = rows
        self._holds_all = False
        self._layers: list[tuple[Any, ...]] = []

    def add(
        self, update: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor
    ) -> None:
        """What a layer is about to write to its `cache`, by the backend's `update`."""
        self._holds_all = len(key) <= self.AT_ONCE * len(self._rows)
        if not self._holds_all:
            key, value = key.index_select(0, self._rows), value.index_select(0, self._rows)
        self._layers.append((update, layer, key, value, cache))

    def write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes the K/V of `rows` [K], which are among those that may be written, to `slots` [K]
        of every layer."""
        if not self._holds_all:
            rows = torch.searchsorted(self._rows, rows)
        for update, layer, key, value, cache in self._layers:
            update(layer, key.index_select(0, rows), value.index_select(0, rows), cache, slots)
