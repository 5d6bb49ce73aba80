"""Attention over rows of mixed depths: metadata and forward context for one call of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_loopus.serving.batch_layout import BatchLayout, Spans
from vllm_loopus.serving.transfer import to_device


@dataclass
class Through:
    """Rows [M] whose K/V and states go to other depths too, and their slots there [M]."""

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]


@dataclass(frozen=True)
class Extents:
    """Positions and lengths of T rows in E entries on the device, the same at every depth."""

    positions: torch.Tensor  # [T]
    query_start: torch.Tensor  # [E + 1]
    query_start_cpu: torch.Tensor
    seq_lens: torch.Tensor  # [E]
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
class RowBatch:
    """T rows in E entries on the device, as attention wants them; see `BatchLayout`.

    With padding, E and T are those of the graph: entries beyond the real ones have no row, rows
    beyond the real ones have the slot -1, to which attention backends write nothing.
    """

    spans: Spans | None  # None for those of no sequence
    extents: Extents
    slots: torch.Tensor  # [T] where K/V is written; [T + M] with rows that go to other depths too
    block_table: torch.Tensor  # [E, blocks]
    slot_rows: torch.Tensor | None = None  # [T + M] the row that each slot is for

    @property
    def positions(self) -> torch.Tensor:
        """[T]"""
        return self.extents.positions

    def __len__(self) -> int:
        return len(self.extents.positions)


@dataclass
class _Built:
    """The last metadata that was built, and for what."""

    batch: RowBatch
    graph: BatchDescriptor | None
    metadata: Any


class RowAttention:
    """Builds metadata with the builder of the model's attention backend. One builder serves all
    depths, for all planes look alike; so do graphs, for planes differ in tables and slots alone."""

    def __init__(
        self, group: Any, planes: Any, vllm_config: VllmConfig, device: torch.device
    ) -> None:
        """`group`: any of the runner's attention groups. `planes`: see `planes.py`."""
        self._group = group
        self._planes = planes
        self._vllm_config = vllm_config
        self._device = device
        self._last: _Built | None = None

    def batch(self, layout: BatchLayout, through: Through | None) -> RowBatch:
        """The rows as they are, without padding."""
        spans, slots, slot_rows = layout.spans, layout.own_slots, None
        if through is not None:
            slots = np.concatenate([slots, through.slots])
            rows = np.concatenate([np.arange(len(spans)), through.rows])
            slot_rows = to_device(rows, self._device)
        last = self._last
        if last is not None and last.graph is None and last.batch.spans is spans:
            extents = last.batch.extents
        else:
            extents = Extents.of(spans, self._device)
        return RowBatch(
            spans,
            extents,
            to_device(slots, self._device),
            to_device(layout.block_table, self._device),
            slot_rows,
        )

    @contextmanager
    def over(
        self,
        batch: RowBatch,
        layer_names: list[str],
        graph: BatchDescriptor | None = None,
        capturing: bool = False,
    ) -> Iterator[None]:
        """Inside, the layers attend with each entry in the plane of its depth.

        `graph`: the one to be captured or replayed; its rows are padded.
        """
        metadata = self._metadata(batch, graph, capturing)
        self._planes.slot_rows = batch.slot_rows
        try:
            with set_forward_context(
                dict.fromkeys(layer_names, metadata),
                self._vllm_config,
                num_tokens=len(batch),
                cudagraph_runtime_mode=CUDAGraphMode.NONE if graph is None else CUDAGraphMode.FULL,
                batch_descriptor=graph,
                slot_mapping=dict.fromkeys(layer_names, batch.slots),
            ):
                yield
        finally:
            self._planes.slot_rows = None

    def _metadata(self, batch: RowBatch, graph: BatchDescriptor | None, capturing: bool) -> Any:
        """Of the backend, for `batch`; what was built last for the same rows is given other blocks,
        as vLLM does for KV cache groups that differ in nothing else."""
        builder, last = self._group.get_metadata_builder(), self._last
        extents, slots = batch.extents, batch.slots[: len(batch)]
        if last is not None and last.batch.spans is batch.spans is not None and last.graph == graph:
            renewed = _renewed(builder, last.metadata, batch.block_table, slots)
            if renewed is not None:
                return renewed
        common = CommonAttentionMetadata(
            query_start_loc=extents.query_start,
            query_start_loc_cpu=extents.query_start_cpu,
            seq_lens=extents.seq_lens,
            seq_lens_cpu_upper_bound=extents.seq_lens_cpu,
            num_reqs=len(extents.seq_lens),
            num_actual_tokens=len(batch),
            max_query_len=extents.max_query_len,
            max_seq_len=extents.max_seq_len,
            block_table_tensor=batch.block_table,
            slot_mapping=slots,
            causal=True,
        )
        if capturing:
            metadata = builder.build_for_cudagraph_capture(common)
        else:
            # A backend that schedules ahead has room for so many entries as vLLM itself has
            # sequences; a decoder batch may have two for one (`LoopedSequence.rows_to_decode`).
            crowded = len(extents.seq_lens) > self._vllm_config.scheduler_config.max_num_seqs
            metadata = builder.build(0, common, fast_build=crowded)
        self._last = _Built(batch, graph, metadata)
        return metadata


def _renewed(
    builder: Any, metadata: Any, block_table: torch.Tensor, slots: torch.Tensor
) -> Any | None:
    """`metadata` with other blocks; None where the backend has no way to do that."""
    if builder.supports_update_block_table:
        return builder.update_block_table(metadata, block_table, slots)
    if current_platform.is_cpu():  # the blocks have no say in how vLLM's CPU backend splits work
        metadata.block_table, metadata.slot_mapping = block_table, slots  # the call before is over
        return metadata
    return None
