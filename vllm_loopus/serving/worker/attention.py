"""Attention over rows of mixed depths: metadata and forward context for one call of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_loopus.serving.model.planes import Planes
from vllm_loopus.serving.worker.row_layout import ExtraSlots, RowLayout, Spans
from vllm_loopus.serving.worker.transfer import to_device


@dataclass(frozen=True)
class Extents:
    """Positions and lengths of T rows in C chunks on the device, the same at every depth."""

    positions: torch.Tensor  # [T]
    query_start: torch.Tensor  # [C + 1]
    query_start_cpu: torch.Tensor
    seq_lens: torch.Tensor  # [C]
    seq_lens_cpu: torch.Tensor
    max_query_len: int
    max_seq_len: int

    @classmethod
    def of(cls, spans: Spans, device: torch.device) -> "Extents":
        query_start, seq_lens = spans.offsets.astype(np.int32), spans.ends.astype(np.int32)
        return cls(
            positions=to_device(spans.positions, device),
            query_start=to_device(query_start, device),
            query_start_cpu=torch.from_numpy(query_start),
            seq_lens=to_device(seq_lens, device),
            seq_lens_cpu=torch.from_numpy(seq_lens),
            max_query_len=spans.max_query_len,
            max_seq_len=spans.max_seq_len,
        )


@dataclass
class DeviceRows:
    """T rows in C chunks on the device, as attention wants them; see `RowLayout`.

    With padding, C and T are those of the graph. Chunks beyond the real ones have no row; rows
    beyond the real ones have the slot -1, to which attention backends write nothing.
    """

    spans: Spans | None  # None for rows of no sequence
    extents: Extents
    slots: torch.Tensor  # [T] where K/V is written; [T + M] with M extra slots
    block_table: torch.Tensor  # [C, blocks]
    slot_rows: torch.Tensor | None = None  # [T + M] the row that each slot is for

    @property
    def positions(self) -> torch.Tensor:
        """[T]"""
        return self.extents.positions

    def __len__(self) -> int:
        return len(self.extents.positions)


@dataclass
class _Built:
    """The metadata that was built last, and for what."""

    rows: DeviceRows
    graph: BatchDescriptor | None
    metadata: Any


class RowAttention:
    """Builds metadata with the builder of the model's attention backend. One builder serves all
    depths, because all planes look alike; so do graphs, because planes only differ in tables and
    slots."""

    def __init__(
        self, group: Any, planes: Planes, vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """`group`: any of the runner's attention groups."""
        self._group = group
        self._planes = planes
        self._vllm_config = vllm_config
        self._device = device
        self._last: _Built | None = None

    def rows(self, layout: RowLayout, extra: ExtraSlots | None) -> DeviceRows:
        """The rows as they are, without padding."""
        spans, slots, slot_rows = layout.spans, layout.own_slots, None
        if extra is not None:
            slots = np.concatenate([slots, extra.slots])
            slot_rows = self._tensor(np.concatenate([np.arange(len(spans)), extra.rows]))
        last = self._last
        if last is not None and last.graph is None and last.rows.spans is spans:
            extents = last.rows.extents
        else:
            extents = Extents.of(spans, self._device)
        return DeviceRows(
            spans, extents, self._tensor(slots), self._tensor(layout.block_table), slot_rows
        )

    def _tensor(self, values: NDArray[Any]) -> torch.Tensor:
        return to_device(values, self._device)

    @property
    def stateless(self) -> bool:
        """Whether metadata may be made long before it is used. Some builders plan their kernels in
        memory that the next metadata overwrites."""
        builder = self._group.get_metadata_builder()
        return current_platform.is_cpu() or bool(builder.supports_update_block_table)

    @contextmanager
    def over(
        self,
        rows: DeviceRows,
        layer_names: list[str],
        graph: BatchDescriptor | None = None,
        capturing: bool = False,
        metadata: Any = None,
    ) -> Iterator[None]:
        """Inside, the layers attend with each chunk in the plane of its depth.

        `graph`: the one to be captured or replayed, for padded rows. `metadata`: that of the rows,
        if it has been made.
        """
        metadata = metadata or self.metadata(rows, graph, capturing)
        self._planes.slot_rows = rows.slot_rows
        try:
            with set_forward_context(
                dict.fromkeys(layer_names, metadata),
                self._vllm_config,
                num_tokens=len(rows),
                cudagraph_runtime_mode=CUDAGraphMode.NONE if graph is None else CUDAGraphMode.FULL,
                batch_descriptor=graph,
                slot_mapping=dict.fromkeys(layer_names, rows.slots),
            ):
                yield
        finally:
            self._planes.slot_rows = None

    def metadata(
        self, rows: DeviceRows, graph: BatchDescriptor | None = None, capturing: bool = False
    ) -> Any:
        """The backend's metadata for the rows. If the last metadata was for the same positions, it
        only gets other blocks, as vLLM does for KV cache groups that differ in nothing else."""
        builder, last = self._group.get_metadata_builder(), self._last
        extents, slots = rows.extents, rows.slots[: len(rows)]
        if last is not None and last.rows.spans is rows.spans is not None and last.graph == graph:
            renewed = _renewed(builder, last.metadata, rows.block_table, slots)
            if renewed is not None:
                return renewed
        common = CommonAttentionMetadata(
            query_start_loc=extents.query_start,
            query_start_loc_cpu=extents.query_start_cpu,
            seq_lens=extents.seq_lens,
            seq_lens_cpu_upper_bound=extents.seq_lens_cpu,
            num_reqs=len(extents.seq_lens),
            num_actual_tokens=len(rows),
            max_query_len=extents.max_query_len,
            max_seq_len=extents.max_seq_len,
            block_table_tensor=rows.block_table,
            slot_mapping=slots,
            causal=True,
        )
        if capturing:
            metadata = builder.build_for_cudagraph_capture(common)
        else:
            # A backend that schedules ahead has room for as many chunks as vLLM has sequences; a
            # decoder call may have two for one (`Staircases.chunks_to_decode`).
            crowded = len(extents.seq_lens) > self._vllm_config.scheduler_config.max_num_seqs
            metadata = builder.build(0, common, fast_build=crowded)
        self._last = _Built(rows, graph, metadata)
        return metadata


def _renewed(
    builder: Any, metadata: Any, block_table: torch.Tensor, slots: torch.Tensor
) -> Any | None:
    """`metadata` with other blocks; None if the backend has no way to do that."""
    if builder.supports_update_block_table:
        return builder.update_block_table(metadata, block_table, slots)
    if current_platform.is_cpu():  # vLLM's CPU backend splits work without looking at blocks
        metadata = copy(metadata)  # the other may belong to a call that has been prepared
        metadata.block_table, metadata.slot_mapping = block_table, slots
        return metadata
    return None
