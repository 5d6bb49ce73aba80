"""The computing of a step over paged memory, through vLLM's attention.

It is given the model, block tables and a metadata builder, and knows no model runner.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from vllm_loopus.modeling.exit_rule import ExitRule
from vllm_loopus.serving.model.deferred_writes import DeferredWrites
from vllm_loopus.serving.model.seam import LoopedModel
from vllm_loopus.serving.step.staircase import Chunk
from vllm_loopus.serving.worker.block_tables import BlockTables
from vllm_loopus.serving.worker.exits import Exits
from vllm_loopus.serving.worker.nonfinite import WatchedRows, cleanse
from vllm_loopus.serving.worker.regions import Ran, Regions
from vllm_loopus.serving.worker.row_layout import ExtraSlots, RowLayout
from vllm_loopus.serving.worker.states import StatePages
from vllm_loopus.serving.worker.transfer import to_device
from vllm_loopus.serving.worker.verdicts import Verdicts


@dataclass
class Decoded:
    """Decoder output of a step: hidden states of newest positions, and whose they are."""

    hidden: torch.Tensor | None = None  # [len(request_ids), H]
    request_ids: list[str] = field(default_factory=list)

    def in_order(self, request_ids: Sequence[str]) -> torch.Tensor:
        """The hidden states of `request_ids`, all of those decoded, in their order."""
        assert self.hidden is not None
        row = {request_id: index for index, request_id in enumerate(self.request_ids)}
        order = [row[request_id] for request_id in request_ids]
        if order == list(range(len(self.request_ids))):
            return self.hidden
        return self.hidden.index_select(0, to_device(order, self.hidden.device))


class PromptScorer(Protocol):
    """Scores prompts part by part, as the decoder gives their hidden states."""

    def wants(self, request_id: str) -> bool:
        """Whether the prompt of a request is to be scored."""
        ...

    def score(self, request_id: str, start: int, hidden: torch.Tensor) -> None:
        """`hidden` [n, H]: of the prompt's positions from `start` on. Parts come in order."""
        ...


@dataclass
class _LastPass:
    """The last pass of a step, and its outputs as they would be read from the pages. With graphs
    they lie in the output of one: nothing runs between two passes, and a graph's input is a copy.
    """

    layout: RowLayout
    state: torch.Tensor
    injected: torch.Tensor | None


class PagedExecutor:
    """`StepExecutor` over vLLM's paged memory."""

    def __init__(
        self,
        model: LoopedModel,
        vllm_config: VllmConfig,
        tables: BlockTables,
        attention_group: Any,
        device: torch.device,
        rule: ExitRule,
        scorer: PromptScorer,
    ) -> None:
        """`model`: its K/V memory is bound. `attention_group`: any of the runner's groups; all
        depths have the same K/V shape, so one metadata builder serves them all."""
        planes = model.planes
        self._model = model
        self._tables = tables
        self._device = device
        self._scorer = scorer
        self._regions = Regions(model, vllm_config, attention_group, tables.block_size, device)
        self._verdicts = Verdicts(get_tp_group())
        self._exits = Exits(model, rule, self._verdicts, device)
        self._states = StatePages(planes.state_pages(), planes.state_size)
        self._injected = (
            StatePages(planes.injected_pages(), planes.injected_size)
            if planes.injected_size
            else None
        )
        self._tokens: list[int] = []
        self._encoded: tuple[torch.Tensor, ...] = ()
        self._last_pass: _LastPass | None = None  # of this step
        self.decoded = Decoded()

    @property
    def asynchronous(self) -> bool:
        return self._device.type != "cpu"

    def begin_step(self, tokens: list[int]) -> None:
        """`tokens`: the ids of the new positions, in order."""
        self._tokens = tokens
        self.decoded = Decoded()

    def capture(self) -> int:
        """Captures the graphs of the regions; the bytes that they take."""
        return self._regions.capture()

    def make_room(self, chunk: Chunk) -> int:
        return self._tables.make_room(chunk)

    def make_room_deeper(self, chunks: list[Chunk], passes: int) -> int:
        return self._tables.make_room_deeper(chunks, passes)

    def encode(self, chunks: list[Chunk]) -> None:
        layout = self._tables.layout([Chunk(c.sequence, 1, c.start, c.end) for c in chunks])
        ids = self._tensor(np.array(self._tokens, dtype=np.int32))
        ran = self._regions.encoder(layout, ids)
        self._encoded = ran.outputs
        if self._injected is not None:
            self._injected.write(ran.slots, ran.outputs[1])

    def run_passes(self, chunks: list[Chunk], passes: int, deciding: list[int]) -> list[bool]:
        *shallower, layout = layouts = self._tables.layouts(chunks, passes)
        state, injected = self._inputs(layouts[0])
        for before in shallower:
            _, state = self._run_pass(before, state, injected)
        may_exit = self._may_copy(chunks, deciding)
        # K/V goes to deeper depths once its rows have exited. A graph cannot wait: it writes the
        # K/V of all rows that may exit.
        deferred = may_exit if may_exit and not self._regions.reasoning.replays(layout) else []
        at_once = [] if deferred else may_exit
        extra = layout.extra_slots(at_once, self._deeper(at_once, chunks))
        rows = self._tensor(layout.spans.last_rows[deferred]) if deferred else None
        with self._model.planes.deferring(rows) as writes:
            ran, state = self._run_pass(layout, state, injected, extra)
        self._last_pass = _LastPass(layout, state, injected)
        refined, observed = ran.outputs
        # NaN stays NaN, so the states of the last pass also show NaN of the passes before.
        self._verdicts.watch(WatchedRows.of(chunks, layout, refined))
        exits = self._exits.after(chunks, deciding, layout, observed)
        if writes is not None:
            decided = dict(zip(deciding, exits, strict=True))
            exiting = [
                i for i in deferred if chunks[i].sequence.exits_at(chunks[i].depth, decided[i])
            ]
            extra = layout.extra_slots(exiting, self._deeper(exiting, chunks))
            self._write_deeper(extra, refined, writes)
        return exits

    def _run_pass(
        self,
        layout: RowLayout,
        state: torch.Tensor,
        injected: torch.Tensor | None,
        extra: ExtraSlots | None = None,
    ) -> tuple[Ran, torch.Tensor]:
        """One pass from `state` [T, H] to the depths of `layout`. Stores the new states, and
        returns them as they would be read."""
        depth = None
        if self._model.reads_depth:
            depth = self._tensor(layout.depth[layout.spans.chunk])
        ran = self._regions.reasoning(layout, state, depth, injected, extra=extra)
        refined = ran.outputs[0]
        self._states.write(ran.slots, refined)
        if ran.extra_rows is not None and ran.extra_slots is not None:
            self._states.write(ran.extra_slots, refined.index_select(0, ran.extra_rows))
        return ran, self._states.as_read(refined)

    @staticmethod
    def _may_copy(chunks: list[Chunk], deciding: list[int]) -> list[int]:
        """The chunks whose newest row gives its K/V to deeper depths if it exits, and may exit."""
        return [
            index
            for index in deciding
            if chunks[index].sequence.copies_on_exit
            and chunks[index].depth < chunks[index].sequence.max_depth
            and chunks[index].sequence.predetermined_at(chunks[index].depth) is not False
        ]

    @staticmethod
    def _deeper(indices: list[int], chunks: list[Chunk]) -> list[Sequence[int]]:
        """The depths deeper than those of the chunks `indices`."""
        return [range(chunks[i].depth + 1, chunks[i].sequence.max_depth + 1) for i in indices]

    def _write_deeper(
        self, extra: ExtraSlots | None, states: torch.Tensor, writes: DeferredWrites
    ) -> None:
        """K/V and states of rows that have exited go to their `extra` slots."""
        if extra is None:
            return
        rows, slots = self._tensor(extra.rows), self._tensor(extra.slots)
        self._states.write(slots, states.index_select(0, rows))
        writes.write(rows, slots)

    def _inputs(self, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`h^{r-1}` [T, H] and the constant input [T, I] of all rows: from the encoder, from the
        last pass, or from the pages."""
        last, self._last_pass = self._last_pass, None
        if last is not None and layout.follows(last.layout):
            return last.state, last.injected
        fresh = int(layout.spans.offsets[np.count_nonzero(layout.depth == 1)])  # rows, the first
        # Depth 0 has no pages: depth 1 stands in for the fresh rows, which are cut off.
        state = self._with_fresh(self._states, 0, layout, np.maximum(layout.depth - 1, 1), fresh)
        if self._injected is None:
            return state, None
        first = np.ones_like(layout.depth)
        return state, self._with_fresh(self._injected, 1, layout, first, fresh)

    def _with_fresh(
        self,
        pages: StatePages,
        output: int,
        layout: RowLayout,
        depth: NDArray[np.int64],
        fresh: int,
    ) -> torch.Tensor:
        """An `output` of the encoder for the first `fresh` rows; for the others, what the `pages`
        hold at the `depth` of their chunk."""
        if fresh == len(layout.spans):
            return self._encoded[output]
        stored = pages.read(self._tensor(layout.slots(depth)[fresh:]))
        return torch.cat([self._encoded[output], stored]) if fresh else stored

    def check_states(self) -> None:
        self._last_pass = None
        self._verdicts.check_states()

    def cleanse(self, request_id: str) -> None:
        """Removes NaN and infinity from the blocks of a sequence that failed."""
        cleanse(self._model.planes.caches(), self._tables.blocks(request_id))

    def decode(self, chunks: list[Chunk]) -> None:
        self._last_pass = None
        layout = self._tables.layout(chunks)
        states = self._states.read(self._tensor(layout.own_slots))
        copying = [i for i, c in enumerate(chunks) if c.newest and c.sequence.copies_on_exit]
        others = [chunks[i].sequence.other_exits(chunks[i].depth) for i in copying]
        (hidden,) = self._regions.decoder(
            layout,
            states,
            extra=layout.extra_slots(copying, others),
            wanted=self._wanted(chunks, layout),
        ).outputs
        self._verdicts.watch(WatchedRows.of(chunks, layout, hidden, "in the decoder "))
        self._verdicts.check_states()
        newest = []
        for index, chunk in enumerate(chunks):
            if chunk.sequence.failure:
                continue
            self._tables.mark_decoded(chunk)
            if self._scorer.wants(chunk.sequence.request_id):
                part = hidden[slice(*layout.spans.offsets[index : index + 2])]
                self._scorer.score(chunk.sequence.request_id, chunk.start, part)
            if chunk.newest:
                newest.append(index)
        if newest:
            rows = self._tensor(layout.spans.last_rows[newest])
            self.decoded.hidden = hidden.index_select(0, rows)
            self.decoded.request_ids = [chunks[index].sequence.request_id for index in newest]

    def _wanted(self, chunks: list[Chunk], layout: RowLayout) -> NDArray[np.int64] | None:
        """The rows [M] of a decoder call whose hidden states are used: newest positions, and
        prompts to be scored.

        None for all. At least one row, for layers that cannot run on none.
        """
        if len(chunks) == len(layout.spans) and all(chunk.newest for chunk in chunks):
            return None
        offsets = layout.spans.offsets
        parts = [
            np.arange(start, end)
            if self._scorer.wants(chunk.sequence.request_id)
            else np.arange(end - chunk.newest, end)
            for chunk, start, end in zip(chunks, offsets, offsets[1:], strict=False)
        ]
        wanted = np.concatenate(parts)
        if len(wanted) == len(layout.spans):
            return None
        return wanted if len(wanted) else np.array([0])

    def _tensor(self, values: NDArray[Any] | Sequence[float]) -> torch.Tensor:
        return to_device(values, self._device)
