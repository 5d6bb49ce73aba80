"""Rows padded to a few row counts, in buffers that stay where they are: what a CUDA graph needs.

A graph holds addresses. All that differs between two passes of the same padded size, positions,
block tables, slots and states, is written into the same buffers before each; depth is among it,
for planes of different depths are the same tensors under other block tables. So one set of graphs
serves all depths.

Padded rows have slot -1, so attention writes nothing for them; padded entries have no row and no
length, so nothing attends. What comes out for padded rows is cut off before anybody looks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from vllm_loopus.serving.attention import Extents, RowBatch, Through
from vllm_loopus.serving.batch_layout import BatchLayout, Spans
from vllm_loopus.serving.transfer import to_device


@dataclass(frozen=True)
class Limits:
    """The most that padded batches need room for."""

    rows: int
    entries: int
    blocks: int  # of a sequence, at one depth
    max_seq_len: int
    copies: int  # other depths that a row's K/V may go to; 0 unless deeper depths take over


class Padding:
    """The sizes, and the buffers of the greatest one."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        mode: CUDAGraphMode,
        limits: Limits,
        state: torch.Tensor,
    ) -> None:
        """`mode`: as resolved for the attention backend. `state` [R, H]: room for input states."""
        self._dispatcher = CudagraphDispatcher(vllm_config)
        self._dispatcher.initialize_cudagraph_keys(mode)
        self._limits = limits
        self._device = device = state.device
        self.state = state
        self.ids = torch.zeros(limits.rows, dtype=torch.int32, device=device)
        self.wanted = torch.zeros(limits.entries, dtype=torch.int64, device=device)
        self._positions = torch.zeros(limits.rows, dtype=torch.int64, device=device)
        through = limits.entries * limits.copies
        self._slots = torch.full((limits.rows + through,), PAD_SLOT_ID, device=device)
        self._slot_rows = torch.zeros(limits.rows + through, dtype=torch.int64, device=device)
        self._query_start = torch.zeros(limits.entries + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(limits.entries, dtype=torch.int32, device=device)
        self._tables = torch.zeros(limits.entries, limits.blocks, dtype=torch.int32, device=device)
        self._held: tuple[BatchDescriptor, Spans, Extents] | None = None  # of the last `fill`

    def descriptors(self) -> list[BatchDescriptor]:
        """The padded sizes, the greatest first, so that the others share its memory."""
        captured = self._dispatcher.get_capture_descs()
        return [descriptor for _, descriptors in captured for descriptor in descriptors]

    def fit(self, layout: BatchLayout) -> BatchDescriptor | None:
        """The smallest size that holds the batch; None where it has to run as it is."""
        rows, entries = len(layout.spans), len(layout.spans.ends)
        mode, descriptor = self._dispatcher.dispatch(rows, uniform_decode=rows == entries)
        if mode != CUDAGraphMode.FULL or entries > _entries(descriptor):
            return None
        return descriptor

    def fill(self, size: BatchDescriptor, layout: BatchLayout, through: Through | None) -> RowBatch:
        """Writes a batch into the buffers."""
        slots = _padded(layout.own_slots, self._num_slots(size), PAD_SLOT_ID)
        if through is not None:
            slots[size.num_tokens : size.num_tokens + len(through.slots)] = through.slots
        table = layout.block_table
        self._tables[: len(table), : table.shape[1]].copy_(
            to_device(table, self._device), non_blocking=True
        )
        spans = layout.spans
        return self._batch(size, spans, self._extents_of(size, spans), slots, through)

    def dummy(self, size: BatchDescriptor) -> RowBatch:
        """A batch to capture with: as many entries as the size allows, and nothing is written."""
        entries, rows = _entries(size), size.num_tokens
        offsets = (np.arange(entries + 1) * rows // entries).astype(np.int32)
        self._held = None
        extents = self._write_extents(size, np.zeros(0, dtype=np.int64), offsets, np.diff(offsets))
        return self._batch(size, None, extents, np.full(self._num_slots(size), PAD_SLOT_ID))

    def _num_slots(self, size: BatchDescriptor) -> int:
        return size.num_tokens + _entries(size) * self._limits.copies

    def _extents_of(self, size: BatchDescriptor, spans: Spans) -> Extents:
        """In the buffers, where they may be already."""
        if self._held is None or self._held[0] != size or self._held[1] is not spans:
            offsets, entries = spans.offsets.astype(np.int32), _entries(size)
            offsets = _padded(offsets, entries + 1, int(offsets[-1]))
            ends = _padded(spans.ends.astype(np.int32), entries, 0)
            extents = self._write_extents(size, spans.positions, offsets, ends)
            self._held = size, spans, extents
        return self._held[2]

    def _write_extents(
        self,
        size: BatchDescriptor,
        positions: NDArray[np.int64],
        offsets: NDArray[np.int32],
        ends: NDArray[np.int32],
    ) -> Extents:
        return Extents(
            positions=self._write(self._positions, positions, size.num_tokens, 0),
            query_start=self._write(self._query_start, offsets, len(offsets), 0),
            query_start_cpu=torch.from_numpy(offsets),
            seq_lens=self._write(self._seq_lens, ends, len(ends), 0),
            seq_lens_cpu=torch.from_numpy(ends),
            # A graph keeps what these were when it was captured: bounds that hold for all batches.
            max_query_len=1 if size.uniform else size.num_tokens,
            max_seq_len=self._limits.max_seq_len,
        )

    def _batch(
        self,
        size: BatchDescriptor,
        spans: Spans | None,
        extents: Extents,
        slots: NDArray[np.int64],
        through: Through | None = None,
    ) -> RowBatch:
        rows = np.arange(size.num_tokens)
        if through is not None:
            rows = np.concatenate([rows, through.rows])
        return RowBatch(
            spans,
            extents,
            slots=self._write(self._slots, slots, len(slots), PAD_SLOT_ID),
            block_table=self._tables[: _entries(size)],
            slot_rows=self._write(self._slot_rows, rows, len(slots), 0)
            if len(slots) > size.num_tokens
            else None,
        )

    def write_rows(self, size: BatchDescriptor, rows: torch.Tensor) -> torch.Tensor:
        """Token ids [T] or states [T, H] in their buffer, zeros below them: [P] or [P, H]."""
        buffer = (self.ids if rows.dim() == 1 else self.state)[: size.num_tokens]
        buffer[: len(rows)].copy_(rows)
        buffer[len(rows) :].zero_()
        return buffer

    def write_wanted(self, size: BatchDescriptor, wanted: NDArray[np.int64]) -> torch.Tensor | None:
        """Rows of the decoder that are looked at, row 0 again and again below them; None when they
        are more than the buffer holds."""
        if len(wanted) > _entries(size):
            return None
        return self._write(self.wanted, wanted, _entries(size), 0)

    def _write(self, buffer: torch.Tensor, values: NDArray[Any], length: int, rest: int) -> Any:
        padded = values if len(values) == length else _padded(values, length, rest)
        buffer[:length].copy_(to_device(padded, self._device), non_blocking=True)
        return buffer[:length]


def _padded(values: NDArray[Any], length: int, rest: int) -> NDArray[Any]:
    result = np.full(length, rest, dtype=values.dtype)
    result[: len(values)] = values
    return result


def _entries(size: BatchDescriptor) -> int:
    assert size.num_reqs is not None
    return size.num_reqs
