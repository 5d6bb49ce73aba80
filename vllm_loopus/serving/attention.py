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
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_loopus.serving.pages import BatchLayout
from vllm_loopus.serving.transfer import to_device


@dataclass
class Through:
    """Rows [M] whose K/V and states go to other depths too, and their slots there [M]."""

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]


@dataclass
class RowBatch:
    """T rows in E entries on the device, as attention wants them; see `BatchLayout`.

    With padding, E and T are those of the graph: entries beyond the real ones have no row, rows
    beyond the real ones have the slot -1, to which attention backends write nothing.
    """

    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T] where K/V is written; [T + M] with rows that go to other depths too
    query_start: torch.Tensor  # [E + 1]
    query_start_cpu: torch.Tensor
    seq_lens: torch.Tensor  # [E]
    seq_lens_cpu: torch.Tensor
    block_table: torch.Tensor  # [E, blocks]
    max_query_len: int
    max_seq_len: int
    slot_rows: torch.Tensor | None = None  # [T + M] the row that each slot is for

    @classmethod
    def of(cls, layout: BatchLayout, through: Through | None, device: torch.device) -> "RowBatch":
        """The rows as they are."""
        slots, slot_rows = layout.own_slots, None
        if through is not None:
            slots = np.concatenate([slots, through.slots])
            slot_rows = np.concatenate([np.arange(len(layout.positions)), through.rows])
        query_start, seq_lens = layout.offsets.astype(np.int32), layout.ends.astype(np.int32)
        return cls(
            positions=to_device(layout.positions, device),
            slots=to_device(slots, device),
            query_start=to_device(query_start, device),
            query_start_cpu=torch.from_numpy(query_start),
            seq_lens=to_device(seq_lens, device),
            seq_lens_cpu=torch.from_numpy(seq_lens),
            block_table=to_device(layout.block_table(), device),
            max_query_len=int(np.diff(layout.offsets).max()),
            max_seq_len=int(layout.ends.max()),
            slot_rows=None if slot_rows is None else to_device(slot_rows, device),
        )

    def __len__(self) -> int:
        return len(self.positions)


class RowAttention:
    """Builds metadata with the builder of the model's attention backend. One builder serves all
    depths, for all planes look alike; so do graphs, for planes differ in tables and slots alone."""

    def __init__(self, group: Any, planes: Any, vllm_config: VllmConfig) -> None:
        """`group`: any of the runner's attention groups. `planes`: see `planes.py`."""
        self._group = group
        self._planes = planes
        self._vllm_config = vllm_config

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
        builder = self._group.get_metadata_builder()
        common = CommonAttentionMetadata(
            query_start_loc=batch.query_start,
            query_start_loc_cpu=batch.query_start_cpu,
            seq_lens=batch.seq_lens,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu,
            num_reqs=len(batch.seq_lens),
            num_actual_tokens=len(batch),
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slots[: len(batch)],
            causal=True,
        )
        if capturing:
            metadata = builder.build_for_cudagraph_capture(common)
        else:
            # A backend that schedules ahead has room for so many entries as vLLM itself has
            # sequences; a decoder batch may have two for one (`LoopedSequence.rows_to_decode`).
            crowded = len(batch.seq_lens) > self._vllm_config.scheduler_config.max_num_seqs
            metadata = builder.build(0, common, fast_build=crowded)
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
