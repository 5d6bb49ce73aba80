"""Regions: the parts of the model that a step runs, encoder, reasoning block and decoder, as they
are or as CUDA graphs over padded rows.

Graphs are vLLM's (`CUDAGraphWrapper`, sizes and keys of `CudagraphDispatcher`), asked for by
`cudagraph_mode` `FULL` or `FULL_DECODE_ONLY`. What a graph cannot hold runs as it is: more rows
than the greatest size, prompts whose hidden states are kept. Reading and writing of states, halting
and the verdict stay outside.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv

from vllm_loopus.serving.attention import RowAttention, RowBatch, Through
from vllm_loopus.serving.batch_layout import BatchLayout
from vllm_loopus.serving.knobs import EngineOptions
from vllm_loopus.serving.padding import Limits, Padding
from vllm_loopus.serving.transfer import to_device

logger = init_logger("vllm.loopus")

PADDED_ROWS = "VLLM_LOOPUS_PADDED_ROWS"  # row counts: pads, but captures nothing; for tests


@dataclass
class Ran:
    """What a region gave: `outputs` [T, ...] each, the input rows `rows` [T, ...] and their slots;
    `repeated` [M] and `more_slots` [M] of rows that go to other depths too (`Through`).

    With graphs all of it lies in buffers that the next call of any region overwrites.
    """

    outputs: tuple[torch.Tensor, ...]
    rows: torch.Tensor
    slots: torch.Tensor
    repeated: torch.Tensor | None = None
    more_slots: torch.Tensor | None = None


class Region:
    """`run(rows, positions)` or `run(rows, positions, wanted)` over rows of mixed depths."""

    def __init__(
        self,
        run: Callable[..., Any],
        layer_names: list[str],
        attention: RowAttention,
        device: torch.device,
        padding: Padding | None = None,
        graph: Callable[..., Any] | None = None,
        selects: bool = False,
    ) -> None:
        """`graph`: runs padded rows, captured or not. `selects`: `run` takes `wanted`."""
        self._run = run
        self._names = layer_names
        self._attention = attention
        self._device = device
        self._padding = padding
        self._graph = graph
        self._selects = selects

    def replays(self, layout: BatchLayout) -> bool:
        """Whether the rows would run padded, as a graph that fixes what is written where."""
        return self._padding is not None and self._padding.fit(layout) is not None

    def __call__(
        self,
        layout: BatchLayout,
        rows: torch.Tensor,
        through: Through | None = None,
        wanted: Any = None,
        keeps: bool = False,
    ) -> Ran:
        """`rows` [T, ...]: token ids or states. `wanted` [M]: see `Decoder`; None for all.
        `keeps`: the outputs must outlive the next call."""
        size = None if self._padding is None or keeps else self._padding.fit(layout)
        if size is not None:
            assert self._padding is not None
            extra: tuple[Any, ...] = ()
            if self._selects:
                selected = layout.spans.last_rows if wanted is None else wanted
                extra = (self._padding.write_wanted(size, selected),)
            batch = self._padding.fill(size, layout, through)
            given = self._padding.write_rows(size, rows)
            outputs = self._padded(size, batch, given, extra)
            return self._ran(outputs, given[: len(rows)], batch, through)
        batch = self._attention.batch(layout, through)
        extra = (None if wanted is None else to_device(wanted, self._device),)
        with self._attention.over(batch, self._names):
            outputs = self._run(rows, batch.positions, *(extra if self._selects else ()))
        return self._ran(outputs, rows, batch, through)

    def _padded(
        self,
        size: Any,
        batch: RowBatch,
        given: torch.Tensor,
        extra: tuple[Any, ...],
        capturing: bool = False,
    ) -> Any:
        assert self._graph is not None
        with self._attention.over(batch, self._names, size, capturing):
            return self._graph(given, batch.positions, *extra)

    def _ran(
        self, outputs: Any, rows: torch.Tensor, batch: RowBatch, through: Through | None
    ) -> Ran:
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        ran = Ran(tuple(output[: len(rows)] for output in several), rows, batch.slots[: len(rows)])
        if through is not None:
            assert batch.slot_rows is not None
            ran.repeated = batch.slot_rows[len(batch) :][: len(through.rows)]
            ran.more_slots = batch.slots[len(batch) :][: len(through.slots)]
        return ran

    def capture(self, takes_ids: bool) -> int:
        """Captures all sizes, each after a run without; the number of graphs."""
        padding = self._padding
        if padding is None:
            return 0
        sizes = padding.descriptors()
        for size in sizes:
            batch = padding.dummy(size)
            given = (padding.ids if takes_ids else padding.state)[: size.num_tokens]
            extra = (padding.wanted[: size.num_reqs],) if self._selects else ()
            with self._attention.over(batch, self._names):
                self._run(given, batch.positions, *extra)
            self._padded(size, batch, given, extra, capturing=True)
        return len(sizes)


class Regions:
    """The three regions of a model."""

    def __init__(
        self,
        model: Any,
        vllm_config: VllmConfig,
        attention_group: Any,
        block_size: int,
        device: torch.device,
    ) -> None:
        attention = RowAttention(attention_group, model.planes, vllm_config, device)
        padding, graph = _graphs(vllm_config, block_size, device)

        def region(part: str, names: list[str], selects: bool = False) -> Region:
            def run(*arguments: Any) -> Any:
                return getattr(model, part)(*arguments)

            replayed = graph(run) if graph is not None else None
            return Region(run, names, attention, device, padding, replayed, selects)

        self.encoder = region("encode", model.planes.encoder_names)
        self.reasoning = region("refine", model.planes.reasoning_names)
        self.decoder = region("decode", model.planes.decoder_names, selects=True)
        self._device = device

    @torch.inference_mode()
    def capture(self) -> int:
        """Captures all graphs. Returns the bytes that they take, 0 where none is."""
        if self._device.type != "cuda":
            return self._capture() * 0
        before = torch.accelerator.get_memory_info()[0]
        set_cudagraph_capturing_enabled(True)
        try:
            with graph_capture(device=self._device):
                number = self._capture()
        finally:
            set_cudagraph_capturing_enabled(False)
        torch.accelerator.synchronize()
        taken = before - torch.accelerator.get_memory_info()[0]
        logger.info("Captured %d CUDA graphs, %.2f GiB", number, taken / 2**30)
        return taken

    def _capture(self) -> int:
        return (
            self.reasoning.capture(takes_ids=False)
            + self.decoder.capture(takes_ids=False)
            + self.encoder.capture(takes_ids=True)
        )


def _graphs(
    vllm_config: VllmConfig, block_size: int, device: torch.device
) -> tuple[Padding | None, Callable[..., Any] | None]:
    """Padding and what makes a graph of a region; None where regions run as they are."""
    compilation = vllm_config.compilation_config
    graph: Callable[..., Any]
    if given := os.environ.get(PADDED_ROWS):
        sizes = sorted({int(size) for size in given.split(",")})
        vllm_config, compilation = copy.copy(vllm_config), copy.copy(compilation)
        vllm_config.compilation_config = compilation
        compilation.cudagraph_mode = CUDAGraphMode.FULL
        compilation.cudagraph_capture_sizes = sizes
        compilation.max_cudagraph_capture_size = sizes[-1]
        graph = uncaptured
    elif compilation.cudagraph_mode and compilation.cudagraph_mode.has_full_cudagraphs():

        def graph(run: Callable[..., Any]) -> Callable[..., Any]:
            return CUDAGraphWrapper(run, vllm_config, CUDAGraphMode.FULL)
    else:
        return None, None
    rows = compilation.max_cudagraph_capture_size
    if not rows:
        return None, None
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    takes_over = EngineOptions.of(vllm_config.additional_config).takes_over
    limits = Limits(
        rows=rows,
        entries=min(rows, scheduler.max_num_seqs),
        blocks=cdiv(model.max_model_len, block_size),
        max_seq_len=model.max_model_len,
        copies=model.hf_config.max_loops - 1 if takes_over else 0,
    )
    state = torch.zeros(rows, model.hf_config.hidden_size, dtype=model.dtype, device=device)
    return Padding(vllm_config, compilation.cudagraph_mode, limits, state), graph


def uncaptured(run: Callable[..., Any]) -> Callable[..., Any]:
    """Runs padded rows each time anew: finds what padding does and costs, without a GPU."""
    return run
