"""Regions: the parts of a model that a step runs (encoder, reasoning block, decoder), eagerly or as
CUDA graphs over padded rows.

Graphs are vLLM's (`CUDAGraphWrapper`, sizes and keys of `CudagraphDispatcher`); `cudagraph_mode`
`FULL` or `FULL_DECODE_ONLY` asks for them. Calls that no graph can hold run eagerly: more rows than
the greatest size, prompts that are scored. Reading and writing of states, exits and verdicts stay
outside.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import BatchDescriptor
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv

from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.model.seam import LoopedModel
from vllm_loopus.serving.worker.attention import DeviceRows, RowAttention
from vllm_loopus.serving.worker.padding import Limits, Padding, RowBuffers
from vllm_loopus.serving.worker.row_layout import ExtraSlots, RowLayout
from vllm_loopus.serving.worker.transfer import to_device

logger = init_logger("vllm.loopus")

PADDED_ROWS = "VLLM_LOOPUS_PADDED_ROWS"  # row counts: pads, but captures nothing; for tests

Run = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass
class Ran:
    """What a region computed: `outputs` [T, ...] each, and the slots [T] of its rows. If rows have
    extra slots: those rows and slots [M].

    With graphs, all of it lies in buffers that the next call of any region overwrites.
    """

    outputs: tuple[torch.Tensor, ...]
    slots: torch.Tensor
    extra_rows: torch.Tensor | None = None
    extra_slots: torch.Tensor | None = None


@dataclass(frozen=True)
class PreparedCall:
    """A call of a region that is ready to be launched, but for its inputs."""

    rows: DeviceRows
    metadata: Any
    extra: ExtraSlots | None
    wanted: torch.Tensor | None


class Region:
    """`run(first, positions, *others)` over rows of mixed depths, `others` and `wanted` included
    where the part of the model takes them."""

    def __init__(
        self,
        run: Run,
        layer_names: list[str],
        attention: RowAttention,
        device: torch.device,
        padding: Padding | None = None,
        graph: Run | None = None,
        buffers: Sequence[torch.Tensor | None] = (),
        selects: bool = False,
    ) -> None:
        """`graph`: runs padded rows, captured or not. `buffers`: one for each of `first` and
        `others`. `selects`: `run` takes `wanted`."""
        self._run = run
        self._names = layer_names
        self._attention = attention
        self._device = device
        self._padding = padding
        self._graph = graph
        self._buffers = buffers
        self._selects = selects

    @property
    def padded(self) -> bool:
        """Whether some calls run padded."""
        return self._padding is not None

    def replays(self, layout: RowLayout) -> bool:
        """Whether the rows would run padded, as a graph that fixes what is written where."""
        return self._padding is not None and self._padding.fit(layout) is not None

    def prepare(
        self,
        layout: RowLayout,
        extra: ExtraSlots | None = None,
        wanted: NDArray[np.int64] | None = None,
    ) -> PreparedCall | None:
        """What a call needs besides its inputs, made while the device runs another one. None if the
        call is to be padded, since its buffers are in use, or the backend cannot do that."""
        if self._padding is not None or not self._attention.stateless:
            return None
        rows = self._attention.rows(layout, extra)
        used = None if wanted is None else to_device(wanted, self._device)
        return PreparedCall(rows, self._attention.metadata(rows), extra, used)

    def __call__(
        self,
        layout: RowLayout,
        first: torch.Tensor,
        *others: torch.Tensor | None,
        extra: ExtraSlots | None = None,
        wanted: NDArray[np.int64] | None = None,
        prepared: PreparedCall | None = None,
    ) -> Ran:
        """`first`, `others` [T, ...]: what the part of the model takes. `extra`: slots that K/V
        also goes to. `wanted` [M]: the rows that are used, where `run` selects; None for all.
        `prepared`: what `prepare` returned for the same."""
        padding = self._padding
        if prepared is not None:
            if self._selects:
                others = (*others, prepared.wanted)
            with self._attention.over(prepared.rows, self._names, metadata=prepared.metadata):
                outputs = self._run(first, prepared.rows.positions, *others)
            return _ran(outputs, prepared.rows, len(first), prepared.extra)
        if padding is not None:
            selected = np.arange(len(first)) if wanted is None else wanted
            size = padding.fit(layout, len(selected) if self._selects else None)
            if size is not None:
                return self._run_padded(padding, size, layout, (first, *others), extra, selected)
        rows = self._attention.rows(layout, extra)
        if self._selects:
            others = (*others, None if wanted is None else to_device(wanted, self._device))
        with self._attention.over(rows, self._names):
            outputs = self._run(first, rows.positions, *others)
        return _ran(outputs, rows, len(first), extra)

    def _run_padded(
        self,
        padding: Padding,
        size: BatchDescriptor,
        layout: RowLayout,
        inputs: Sequence[torch.Tensor | None],
        extra: ExtraSlots | None,
        selected: NDArray[np.int64],
    ) -> Ran:
        rows = padding.fill(size, layout, extra)
        given = [
            None if values is None or buffer is None else padding.write_rows(size, buffer, values)
            for values, buffer in zip(inputs, self._buffers, strict=True)
        ]
        if self._selects:
            given.append(padding.write_wanted(size, selected))
        outputs = self._replay(size, rows, given)
        return _ran(outputs, rows, len(layout.spans), extra)

    def _replay(
        self,
        size: BatchDescriptor,
        rows: DeviceRows,
        given: Sequence[torch.Tensor | None],
        capturing: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        assert self._graph is not None
        first, *others = given
        with self._attention.over(rows, self._names, size, capturing):
            return self._graph(first, rows.positions, *others)

    def capture(self) -> int:
        """Captures all sizes, each after a run without; the number of graphs."""
        padding = self._padding
        if padding is None:
            return 0
        sizes = padding.descriptors()
        for size in sizes:
            rows = padding.dummy(size)
            given = [b if b is None else b[: size.num_tokens] for b in self._buffers]
            if self._selects:
                given.append(padding.wanted[: size.num_reqs])
            first, *others = given
            with self._attention.over(rows, self._names):
                self._run(first, rows.positions, *others)
            self._replay(size, rows, given, capturing=True)
        return len(sizes)


def _ran(
    outputs: torch.Tensor | tuple[torch.Tensor, ...],
    rows: DeviceRows,
    count: int,
    extra: ExtraSlots | None,
) -> Ran:
    """What a call gave for its first `count` rows, without those that pad it."""
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    ran = Ran(tuple(output[:count] for output in several), rows.slots[:count])
    if extra is not None:
        assert rows.slot_rows is not None
        ran.extra_rows = rows.slot_rows[len(rows) :][: len(extra.rows)]
        ran.extra_slots = rows.slots[len(rows) :][: len(extra.slots)]
    return ran


class Regions:
    """The three regions of a model."""

    def __init__(
        self,
        model: LoopedModel,
        vllm_config: VllmConfig,
        attention_group: Any,
        block_size: int,
        device: torch.device,
    ) -> None:
        attention = RowAttention(attention_group, model.planes, vllm_config, device)
        padding, graph = _graphs(vllm_config, model, block_size, device)
        buffers = None if padding is None else padding.buffers

        def region(part: str, names: list[str], *inputs: str, selects: bool = False) -> Region:
            def run(*arguments: torch.Tensor | None) -> torch.Tensor | tuple[torch.Tensor, ...]:
                # Looked up at each call: tests and tools replace parts of a model.
                result: torch.Tensor | tuple[torch.Tensor, ...] = getattr(model, part)(*arguments)
                return result

            return Region(
                run,
                names,
                attention,
                device,
                padding,
                None if graph is None else graph(run),
                [getattr(buffers, name) for name in inputs] if buffers is not None else (),
                selects,
            )

        planes = model.planes
        seed = ["seed"] if model.reads_seed else []
        self.encoder = region("encode", planes.encoder_names, "ids", *seed)
        self.reasoning = region("refine", planes.pass_names, "state", "depth", "injected")
        self.decoder = region("decode", planes.decoder_names, "state", selects=True)
        self._device = device

    @torch.inference_mode()
    def capture(self) -> int:
        """Captures all graphs. Returns the bytes that they take, 0 if there are none."""
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
        return self.reasoning.capture() + self.decoder.capture() + self.encoder.capture()


def _graphs(
    vllm_config: VllmConfig, model: LoopedModel, block_size: int, device: torch.device
) -> tuple[Padding | None, Callable[[Run], Run] | None]:
    """Padding and what makes a graph of a region; None where regions run eagerly."""
    compilation = vllm_config.compilation_config
    graph: Callable[[Run], Run]
    if given := os.environ.get(PADDED_ROWS):
        sizes = sorted({int(size) for size in given.split(",")})
        vllm_config, compilation = copy.copy(vllm_config), copy.copy(compilation)
        vllm_config.compilation_config = compilation
        compilation.cudagraph_mode = CUDAGraphMode.FULL
        compilation.cudagraph_capture_sizes = sizes
        compilation.max_cudagraph_capture_size = sizes[-1]
        graph = uncaptured
    elif compilation.cudagraph_mode and compilation.cudagraph_mode.has_full_cudagraphs():

        def graph(run: Run) -> Run:
            return CUDAGraphWrapper(run, vllm_config, CUDAGraphMode.FULL)
    else:
        return None, None
    rows = compilation.max_cudagraph_capture_size
    if not rows:
        return None, None
    config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    copies = EngineOptions.of(vllm_config.additional_config).last_exited
    limits = Limits(
        rows=rows,
        chunks=min(rows, scheduler.max_num_seqs),
        blocks=cdiv(config.max_model_len, block_size),
        max_seq_len=config.max_model_len,
        extra_slots=config.hf_config.max_loops - 1 if copies else 0,
    )
    buffers = _buffers(model, rows, config.dtype, device)
    return Padding(vllm_config, compilation.cudagraph_mode, limits, buffers), graph


def _buffers(model: LoopedModel, rows: int, dtype: torch.dtype, device: torch.device) -> RowBuffers:
    planes = model.planes
    injected = torch.zeros(rows, planes.injected_size, dtype=dtype, device=device)
    depth = torch.ones(rows, dtype=torch.int64, device=device)
    return RowBuffers(
        ids=torch.zeros(rows, dtype=torch.int32, device=device),
        state=torch.zeros(rows, planes.state_size, dtype=dtype, device=device),
        injected=injected if planes.injected_size else None,
        depth=depth if model.reads_depth else None,
        seed=torch.zeros_like(depth) if model.reads_seed else None,
    )


def uncaptured(run: Run) -> Run:
    """Runs padded rows without a graph, to test and measure padding without a GPU."""
    return run
