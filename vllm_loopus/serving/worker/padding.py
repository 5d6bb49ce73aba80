"""Rows padded to a few row counts, in buffers with fixed addresses: what a CUDA graph needs.

A graph holds addresses. All that differs between two passes of the same padded size (positions,
block tables, slots, states) is written into the same buffers before each. Depth is among it, since
planes of different depths are the same tensors with other block tables. So one set of graphs serves
all depths.

Padded rows have slot -1, so attention writes nothing for them. Padded chunks have no row and no
length, so nothing attends. The outputs of padded rows are removed before they are used.
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

from vllm_loopus.serving.worker.attention import DeviceRows, Extents
from vllm_loopus.serving.worker.row_layout import ExtraSlots, RowLayout, Spans
from vllm_loopus.serving.worker.transfer import to_device


@dataclass(frozen=True)
class Limits:
    """The most that padded calls need room for."""

    rows: int
    chunks: int
    blocks: int  # of a sequence, at one depth
    max_seq_len: int
    extra_slots: int  # of a row; 0 unless K/V is copied to deeper depths


@dataclass(frozen=True)
class RowBuffers:
    """Room for what a region is given, R rows each."""

    ids: torch.Tensor  # [R]
    state: torch.Tensor  # [R, H]
    injected: torch.Tensor | None = None  # [R, I], for a model with a constant input
    depth: torch.Tensor | None = None  # [R], for a model whose passes read the depth
    seed: torch.Tensor | None = None  # [R], for a model whose encoder reads the seed


class Padding:
    """The padded sizes, and the buffers of the greatest one."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        mode: CUDAGraphMode,
        limits: Limits,
        buffers: RowBuffers,
    ) -> None:
        """`mode`: as resolved for the attention backend."""
        self._dispatcher = CudagraphDispatcher(vllm_config)
        self._dispatcher.initialize_cudagraph_keys(mode)
        self._limits = limits
        self._device = device = buffers.state.device
        self.buffers = buffers
        self.wanted = torch.zeros(limits.chunks, dtype=torch.int64, device=device)
        self._positions = torch.zeros(limits.rows, dtype=torch.int64, device=device)
        slots = limits.rows + limits.chunks * limits.extra_slots
        self._slots = torch.full((slots,), PAD_SLOT_ID, device=device)
        self._slot_rows = torch.zeros(slots, dtype=torch.int64, device=device)
        self._query_start = torch.zeros(limits.chunks + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(limits.chunks, dtype=torch.int32, device=device)
        self._tables = torch.zeros(limits.chunks, limits.blocks, dtype=torch.int32, device=device)
        self._written: tuple[BatchDescriptor, Spans, Extents] | None = None  # by the last `fill`

    def descriptors(self) -> list[BatchDescriptor]:
        """The padded sizes, the greatest first, so that the others share its memory."""
        captured = self._dispatcher.get_capture_descs()
        return [descriptor for _, descriptors in captured for descriptor in descriptors]

    def fit(self, layout: RowLayout, wanted: int | None = None) -> BatchDescriptor | None:
        """The smallest size that holds a call, and the `wanted` rows of a decoder call; None if it
        has to run as it is."""
        rows, chunks = len(layout.spans), len(layout.spans.ends)
        mode, descriptor = self._dispatcher.dispatch(rows, uniform_decode=rows == chunks)
        if mode != CUDAGraphMode.FULL or max(chunks, wanted or 0) > _chunks(descriptor):
            return None
        return descriptor

    def fill(
        self, size: BatchDescriptor, layout: RowLayout, extra: ExtraSlots | None
    ) -> DeviceRows:
        """Writes the rows of a call into the buffers."""
        slots = _padded(layout.own_slots, self._num_slots(size), PAD_SLOT_ID)
        if extra is not None:
            slots[size.num_tokens : size.num_tokens + len(extra.slots)] = extra.slots
        table = layout.block_table
        self._tables[: len(table), : table.shape[1]].copy_(
            to_device(table, self._device), non_blocking=True
        )
        spans = layout.spans
        return self._rows(size, spans, self._extents_of(size, spans), slots, extra)

    def dummy(self, size: BatchDescriptor) -> DeviceRows:
        """Rows to capture with: as many chunks as the size allows, and nothing is written."""
        chunks, rows = _chunks(size), size.num_tokens
        offsets = (np.arange(chunks + 1) * rows // chunks).astype(np.int32)
        self._written = None
        extents = self._write_extents(size, np.zeros(0, dtype=np.int64), offsets, np.diff(offsets))
        return self._rows(size, None, extents, np.full(self._num_slots(size), PAD_SLOT_ID))

    def _num_slots(self, size: BatchDescriptor) -> int:
        return size.num_tokens + _chunks(size) * self._limits.extra_slots

    def _extents_of(self, size: BatchDescriptor, spans: Spans) -> Extents:
        """In the buffers, where they may be already."""
        if self._written is None or self._written[0] != size or self._written[1] is not spans:
            offsets, chunks = spans.offsets.astype(np.int32), _chunks(size)
            offsets = _padded(offsets, chunks + 1, int(offsets[-1]))
            ends = _padded(spans.ends.astype(np.int32), chunks, 0)
            extents = self._write_extents(size, spans.positions, offsets, ends)
            self._written = size, spans, extents
        return self._written[2]

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
            # A graph uses the values at its capture, so these are bounds that hold for all calls.
            max_query_len=1 if size.uniform else size.num_tokens,
            max_seq_len=self._limits.max_seq_len,
        )

    def _rows(
        self,
        size: BatchDescriptor,
        spans: Spans | None,
        extents: Extents,
        slots: NDArray[np.int64],
        extra: ExtraSlots | None = None,
    ) -> DeviceRows:
        rows = np.arange(size.num_tokens)
        if extra is not None:
            rows = np.concatenate([rows, extra.rows])
        return DeviceRows(
            spans,
            extents,
            slots=self._write(self._slots, slots, len(slots), PAD_SLOT_ID),
            block_table=self._tables[: _chunks(size)],
            slot_rows=self._write(self._slot_rows, rows, len(slots), 0)
            if len(slots) > size.num_tokens
            else None,
        )

    @staticmethod
    def write_rows(size: BatchDescriptor, buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows [T, ...] in their buffer, zeros after them: [P, ...]."""
        buffer = buffer[: size.num_tokens]
        buffer[: len(rows)].copy_(rows)
        buffer[len(rows) :].zero_()
        return buffer

    def write_wanted(self, size: BatchDescriptor, wanted: NDArray[np.int64]) -> torch.Tensor:
        """The rows of a decoder call that are used; after them, row 0 again and again.

        Raises `ValueError` if they are more than the size has room for (see `fit`).
        """
        if len(wanted) > _chunks(size):
            raise ValueError(f"{len(wanted)} wanted rows in a padded call for {_chunks(size)}")
        return self._write(self.wanted, wanted, _chunks(size), 0)

    def _write(
        self, buffer: torch.Tensor, values: NDArray[Any], length: int, rest: int
    ) -> torch.Tensor:
        padded = values if len(values) == length else _padded(values, length, rest)
        buffer[:length].copy_(to_device(padded, self._device), non_blocking=True)
        return buffer[:length]


def _padded(values: NDArray[Any], length: int, rest: int) -> NDArray[Any]:
    result = np.full(length, rest, dtype=values.dtype)
    result[: len(values)] = values
    return result


def _chunks(size: BatchDescriptor) -> int:
    assert size.num_reqs is not None
    return size.num_reqs
