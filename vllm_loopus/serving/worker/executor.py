"""The computing of a step over paged memory, through vLLM's attention.

It is given the model, block tables and a metadata builder, and knows no model runner.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from vllm_loopus.modeling.exit_rule import ExitRule
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.model.seam import LoopedModel
from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints
from vllm_loopus.serving.step.staircase import Staircases
from vllm_loopus.serving.step.wave import NOT_READ
from vllm_loopus.serving.worker.block_tables import BlockTables
from vllm_loopus.serving.worker.calls import Deferred, ExitReading, LastPass, Prepared
from vllm_loopus.serving.worker.decoded import DecodedRows
from vllm_loopus.serving.worker.device_tokens import LikelyTokens, SampledTokens
from vllm_loopus.serving.worker.exits import Exits, deeper_than
from vllm_loopus.serving.worker.flight_states import DepthStates, Places
from vllm_loopus.serving.worker.nonfinite import WatchedRows, cleanse
from vllm_loopus.serving.worker.regions import PreparedCall, Ran, Regions
from vllm_loopus.serving.worker.row_layout import ExtraSlots, RowLayout
from vllm_loopus.serving.worker.seeds import Seeds
from vllm_loopus.serving.worker.states import StatePages
from vllm_loopus.serving.worker.transfer import to_device
from vllm_loopus.serving.worker.verdicts import Verdict, Verdicts


class PromptScorer(Protocol):
    """Scores prompts part by part, as the decoder gives their hidden states."""

    def wants(self, request_id: str) -> bool:
        """Whether the prompt of a request is to be scored."""
        ...

    def score(self, request_id: str, start: int, hidden: torch.Tensor) -> None:
        """`hidden` [n, H]: of the prompt's positions from `start` on. Parts come in order."""
        ...


class Texts(Protocol):
    """What the executor needs to know of running sequences beyond their staircases."""

    def token_ids(self, chunks: Chunks) -> NDArray[np.int32]:
        """The token ids of all rows of `chunks`; anything where a token is still on the device."""
        ...

    def scored(self) -> dict[int, str]:
        """The sequences whose prompts are to be scored, and their request ids."""
        ...


class PagedExecutor:
    """`StepExecutor` over vLLM's paged memory."""

    def __init__(
        self,
        model: LoopedModel,
        vllm_config: VllmConfig,
        stairs: Staircases,
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
        self._stairs = stairs
        self._tables = tables
        self._device = device
        self._scorer = scorer
        self._regions = Regions(model, vllm_config, attention_group, tables.block_size, device)
        self._verdicts = Verdicts(get_tp_group(), stairs, self._cleanse)
        self._exits = Exits(model, rule, device, stairs.slots)
        self._seeds = Seeds(model, vllm_config.model_config.seed, device)
        self._pages = StatePages(planes.state_pages(), planes.state_size, planes.state_dtype)
        beyond = stairs.num_depths - stairs.planes
        self._states = DepthStates(self._pages, planes.state_size, stairs.slots, beyond, device)
        self._injected = (
            StatePages(planes.injected_pages(), planes.injected_size, planes.state_dtype)
            if planes.injected_size
            else None
        )
        self._encoded: tuple[torch.Tensor, ...] = ()
        self._last_pass: LastPass | None = None  # of this step
        self._likely = LikelyTokens(model, get_tp_group(), stairs)
        self.texts: Texts
        self.sampled: SampledTokens | None = None  # tokens that the next `encode` may need
        self.decoded = DecodedRows()

    @property
    def asynchronous(self) -> bool:
        """Whether a call may return before the device has computed it."""
        return self._device.type != "cpu"

    def add(self, index: int, knobs: RequestKnobs, scored: int) -> None:
        """A sequence gets the row `index`. `scored`: positions of its prompt if it is scored."""
        self._exits.add(index, knobs)
        self._states.add(index, scored)
        self._seeds.add(index, knobs)

    def begin_step(self) -> None:
        """Forgets what was decoded."""
        self.decoded = DecodedRows()

    def capture(self) -> int:
        """Captures the graphs of the regions; the bytes that they take."""
        return self._regions.capture()

    def make_room(self, chunks: Chunks) -> Ints:
        return self._tables.make_room(chunks, self.deepest(chunks))

    def make_room_next(self, chunks: Chunks) -> Ints:
        stairs = self._stairs  # they are generated positions, which are copied when they exit
        deepest = stairs.max_depth[chunks.sequence] if stairs.last_exited else None
        return self._tables.make_room(chunks, deepest)

    def make_room_deeper(self, chunks: Chunks, passes: int) -> int:
        return self._tables.make_room_deeper(chunks, passes)

    def deepest(self, chunks: Chunks) -> Ints | None:
        """Up to which depth each chunk needs blocks; None if no deeper than its own."""
        copied = chunks.newest & self._stairs.copies_on_exit(chunks.sequence)
        if not copied.any():
            return None
        return np.where(copied, self._stairs.max_depth[chunks.sequence], chunks.depth)

    def prepare_encoder(self, chunks: Chunks) -> Prepared:
        layout = self._tables.layout(chunks)
        return Prepared(chunks, layout, None, self._regions.encoder.prepare(layout))

    def encode(self, chunks: Chunks, prepared: Prepared | None = None) -> None:
        sampled = self.sampled
        if (
            prepared is not None
            and prepared.call is not None
            and self._injected is None
            and sampled is not None
            and np.array_equal(sampled.sequences, chunks.sequence)
        ):
            self.sampled = None
            self._encode_among(prepared, chunks, sampled.ids)
            return
        layout = self._tables.layout(chunks.at(1))
        inputs = self._seeds.with_seeds(self._token_ids(chunks, layout), chunks, layout)
        ran = self._regions.encoder(layout, *inputs)
        self._encoded = ran.outputs
        if self._injected is not None:
            self._injected.write(ran.slots, ran.outputs[1])

    def _encode_among(self, prepared: Prepared, chunks: Chunks, ids: torch.Tensor) -> None:
        """Encodes the tokens `ids` [C] of `chunks`, one row each, in a call that was prepared for
        more sequences. What the others' rows write is written again when they begin."""
        place = np.empty(self._stairs.capacity, dtype=np.int64)
        place[prepared.chunks.sequence] = np.arange(len(prepared.chunks))
        rows = self._tensor(place[chunks.sequence])
        every = ids.new_zeros(len(prepared.chunks), dtype=torch.int32)
        every.index_copy_(0, rows, ids.to(torch.int32))
        ran = self._regions.encoder(prepared.layout, every, prepared=prepared.call)
        self._encoded = tuple(output.index_select(0, rows) for output in ran.outputs)

    def _token_ids(self, chunks: Chunks, layout: RowLayout) -> torch.Tensor:
        """The token ids [T] of the rows of `chunks`."""
        sampled, self.sampled = self.sampled, None
        if sampled is not None and np.array_equal(sampled.sequences, chunks.sequence):
            return sampled.ids.to(torch.int32)
        known = self.texts.token_ids(chunks)
        ids = self._tensor(known)
        if len(guessed := np.flatnonzero(known == NOT_READ)):
            likely = self._likely.of(chunks.sequence[layout.spans.chunk[guessed]])
            ids = ids.index_copy(0, self._tensor(guessed), likely)
        if sampled is None:
            return ids
        # Rows whose tokens the host does not know yet take them on the device.
        order = np.argsort(sampled.sequences)
        found = np.searchsorted(sampled.sequences, chunks.sequence, sorter=order)
        source = order[np.minimum(found, len(order) - 1)]
        there = sampled.sequences[source] == chunks.sequence
        rows = self._tensor(layout.spans.last_rows[there])
        given = sampled.ids.index_select(0, self._tensor(source[there]))
        return ids.index_copy(0, rows, given.to(ids.dtype))

    def prepare_pass(self, chunks: Chunks) -> Prepared:
        layout = self._tables.layout(chunks)
        source = None
        if self._injected is None and not np.count_nonzero(chunks.depth == 1):
            source = self._states.places(layout, layout.depth - 1)
        return Prepared(chunks, layout, source, self._regions.reasoning.prepare(layout))

    def prepare_decoder(self, chunks: Chunks) -> Prepared | None:
        if self.texts.scored():
            return None
        layout = self._tables.layout(chunks)
        extra, wanted = self._other_exits(layout, chunks), self._wanted(chunks, layout, {})
        call = self._regions.decoder.prepare(layout, extra, wanted)
        return Prepared(chunks, layout, self._states.places(layout, layout.depth), call)

    def run_passes(
        self,
        chunks: Chunks,
        passes: int,
        decides: Callable[[], Ints],
        prepared: Prepared | None = None,
    ) -> ExitReading | None:
        if prepared is not None:
            shallower, layout = [], prepared.layout
            layouts = [layout]
        else:
            *shallower, layout = layouts = self._tables.layouts(chunks, passes)
        source = None if prepared is None else prepared.source
        state, injected = self._inputs(layouts[0], source)
        for before in shallower:
            _, state = self._run_pass(before, state, injected)
        rows, extra = None, None
        if self._stairs.last_exited:
            deciding = decides()
            may_exit = self._may_copy(chunks, deciding)
            # K/V goes to deeper depths once its rows have exited. A graph cannot wait: it writes
            # the K/V of all rows that may exit.
            if not self._regions.reasoning.replays(layout) and may_exit.any():
                rows = self._tensor(layout.spans.last_rows[deciding[may_exit]])
            else:
                extra = self._deeper(layout, chunks, deciding[may_exit])
        with self._model.planes.deferring(rows) as writes:
            call = None if prepared is None else prepared.call
            ran, state = self._run_pass(layout, state, injected, extra, call)
        if not self._stairs.last_exited:
            deciding = decides()  # here the device is busy
        self._last_pass = LastPass(layout, state, injected)
        refined, observed = ran.outputs
        # NaN stays NaN, so the states of the last pass also show NaN of the passes before.
        self._verdicts.watch(WatchedRows.of(self._stairs, layouts, refined))
        if not len(deciding):
            return None
        # An exit depth that was given stands for what the rule would say.
        slot = self._stairs.slot_of(chunks)[deciding]
        asked = self._stairs.given_depths[chunks.sequence[deciding], slot] == 0
        reading = ExitReading(self._ask(chunks, deciding[asked], layout, observed), asked)
        if writes is not None:
            deferred = Deferred(chunks, layout, deciding, may_exit, refined, writes)
            reading.then = partial(self._write_deeper, deferred)
        return reading

    def _ask(
        self, chunks: Chunks, deciding: Ints, layout: RowLayout, observed: torch.Tensor
    ) -> Verdict:
        """Asks the exit rule about the newest positions of the chunks `deciding`."""
        if not len(deciding):
            return self._verdicts.queue(None)
        every = len(deciding) == len(layout.spans)
        exits = self._exits.after(
            chunks.sequence[deciding],
            chunks.end[deciding],
            self._stairs.numbers[chunks.sequence[deciding], self._stairs.slot_of(chunks)[deciding]],
            chunks.depth[deciding],
            None if every else layout.spans.last_rows[deciding],
            observed,
        )
        return self._verdicts.queue(exits)

    def _run_pass(
        self,
        layout: RowLayout,
        state: torch.Tensor,
        injected: torch.Tensor | None,
        extra: ExtraSlots | None = None,
        prepared: PreparedCall | None = None,
    ) -> tuple[Ran, torch.Tensor]:
        """One pass from `state` [T, H] to the depths of `layout`. Stores the new states, and
        returns them as they would be read."""
        depth = None
        if self._model.reads_depth:
            depth = self._tensor(layout.depth[layout.spans.chunk])
        ran = self._regions.reasoning(
            layout, state, depth, injected, extra=extra, prepared=prepared
        )
        refined = ran.outputs[0]
        self._states.write(self._states.own_places(layout, ran.slots), refined)
        if ran.extra_rows is not None and ran.extra_slots is not None:
            self._pages.write(ran.extra_slots, refined.index_select(0, ran.extra_rows))
        return ran, self._pages.as_read(refined)

    def _may_copy(self, chunks: Chunks, deciding: Ints) -> Bools:
        """Which of the chunks `deciding` [S] give the K/V of their newest row to deeper depths if
        it exits."""
        index, stairs = chunks.sequence[deciding], self._stairs
        copies = stairs.copies_on_exit(index)
        return copies & (chunks.depth[deciding] < stairs.last_plane(index))

    def _deeper(self, layout: RowLayout, chunks: Chunks, which: Ints) -> ExtraSlots | None:
        """The slots of the newest rows of the chunks `which` at all deeper depths."""
        if not len(which):
            return None
        last = self._stairs.last_plane(chunks.sequence[which])
        return layout.extra_slots(
            which, deeper_than(chunks.depth[which], last, self._stairs.num_depths)
        )

    def _write_deeper(self, deferred: Deferred, leaving: Bools) -> None:
        """K/V and states of rows that exit, as `leaving` [S] says, go to all deeper depths."""
        exiting = deferred.may_exit & leaving
        extra = self._deeper(deferred.layout, deferred.chunks, deferred.deciding[exiting])
        if extra is None:
            return
        rows, slots = self._tensor(extra.rows), self._tensor(extra.slots)
        self._pages.write(slots, deferred.states.index_select(0, rows))
        deferred.writes.write(rows, slots)

    def _inputs(
        self, layout: RowLayout, source: Places | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`h^{r-1}` [T, H] and the constant input [T, I] of all rows: from the encoder, from the
        last pass, or from where they are stored. `source`: that place, if it is known."""
        last, self._last_pass = self._last_pass, None
        if last is not None and layout.follows(last.layout):
            return last.state, last.injected
        if source is not None:
            return self._states.read(source), None
        fresh = int(layout.spans.offsets[np.count_nonzero(layout.depth == 1)])  # rows, the first
        if fresh == len(layout.spans):
            return self._encoded[0], self._encoded[1] if self._injected is not None else None
        # Depth 0 has no pages: depth 1 stands in for the fresh rows, which are cut off.
        state = self._states.read(self._states.places(layout, np.maximum(layout.depth - 1, 1)))
        state = torch.cat([self._encoded[0], state[fresh:]]) if fresh else state
        if self._injected is None:
            return state, None
        slots = layout.slots(np.ones_like(layout.depth))[fresh:]
        injected = self._injected.read(self._tensor(slots))
        return state, torch.cat([self._encoded[1], injected]) if fresh else injected

    def check_states(self) -> Verdict | None:
        self._last_pass = None
        return self._verdicts.queue(None) if self._verdicts.watching else None

    def must_read(self) -> bool:
        return self._tables.suspects_in_use

    def trust(self, oldest: int) -> None:
        self._tables.trust(oldest)

    def may_chain(self) -> bool:
        # A graph writes the copies of an exit at once, so a later pass would overwrite them.
        return not (self._stairs.last_exited and self._regions.reasoning.padded)

    def cleanse(self, index: int) -> None:
        """Removes NaN and infinity from the blocks of a sequence that failed."""
        self._cleanse(self._tables.blocks(index))

    def _cleanse(self, blocks: NDArray[Any]) -> None:
        cleanse(self._model.planes.floats(), blocks.astype(np.int64))

    def decode(
        self,
        chunks: Chunks,
        used: Bools | None = None,
        prepared: Prepared | None = None,
        guessing: Bools | None = None,
        beginning: Bools | None = None,
    ) -> Verdict:
        self._last_pass = None
        if prepared is not None and prepared.source is not None and prepared.call is not None:
            layout, source, call = prepared.layout, prepared.source, prepared.call
            extra, wanted, scored = call.extra, None, {}
        else:
            layout, call, scored = self._tables.layout(chunks), None, self._scored(chunks)
            source = self._states.places(layout, layout.depth)
            extra = self._other_exits(layout, chunks)
            wanted = self._wanted(chunks, layout, scored)
        states = self._states.read(source)
        (hidden,) = self._regions.decoder(
            layout, states, extra=extra, wanted=wanted, prepared=call
        ).outputs
        self._verdicts.watch(WatchedRows.of(self._stairs, [layout], hidden, "in the decoder "))
        for index, request_id in scored.items():
            part = hidden[slice(*layout.spans.offsets[index : index + 2])]
            self._scorer.score(request_id, int(chunks.start[index]), part)
        chosen = chunks.newest if used is None else chunks.newest & used
        if guessing is not None:
            rows = self._tensor(layout.spans.last_rows[guessing])
            begins = None if beginning is None else beginning[guessing]
            likely = self._likely.guess(chunks.sequence[guessing], hidden[rows], begins)
            if (chosen := chosen & ~guessing).any():
                self._take(hidden, layout, chunks, chosen)
            return self._verdicts.queue(likely)
        self._take(hidden, layout, chunks, chosen)
        return self._verdicts.queue(None)

    def _take(self, hidden: torch.Tensor, layout: RowLayout, chunks: Chunks, chosen: Bools) -> None:
        """Keeps the hidden states of the last rows of the chunks `chosen`."""
        newest = np.flatnonzero(chosen)
        if len(newest) < len(layout.spans):
            hidden = hidden.index_select(0, self._tensor(layout.spans.last_rows[newest]))
        self.decoded = DecodedRows(hidden, chunks.sequence[newest])

    def _other_exits(self, layout: RowLayout, chunks: Chunks) -> ExtraSlots | None:
        """The slots of newest rows that go to all depths at which a token may exit."""
        copying = np.flatnonzero(chunks.newest & self._stairs.copies_on_exit(chunks.sequence))
        if not len(copying):
            return None
        depths, last = self._stairs.may_exit[chunks.sequence[copying]].copy(), self._stairs.planes
        depths[np.arange(len(copying)), chunks.depth[copying]] = False
        depths[:, last] |= chunks.depth[copying] > last
        depths[:, last] |= depths[:, last + 1 :].any(axis=1) & (chunks.depth[copying] != last)
        depths[:, last + 1 :] = False
        return layout.extra_slots(copying, depths)

    def _scored(self, chunks: Chunks) -> dict[int, str]:
        """The chunks of prompts that are to be scored, and their requests."""
        if not (wanted := self.texts.scored()):
            return {}
        exited = chunks.depth == self._stairs.exit_depth[chunks.sequence]
        found = zip(np.flatnonzero(exited).tolist(), chunks.sequence[exited].tolist(), strict=True)
        return {at: wanted[s] for at, s in found if s in wanted and self._scorer.wants(wanted[s])}

    def _wanted(
        self, chunks: Chunks, layout: RowLayout, scored: dict[int, str]
    ) -> NDArray[np.int64] | None:
        """The rows [M] of a decoder call whose hidden states are used: newest positions, and
        prompts to be scored.

        None for all. At least one row, for layers that cannot run on none.
        """
        used = np.zeros(len(layout.spans), dtype=bool)
        used[layout.spans.last_rows[chunks.newest]] = True
        offsets = layout.spans.offsets
        for index in scored:
            used[offsets[index] : offsets[index + 1]] = True
        if used.all():
            return None
        wanted = np.flatnonzero(used)
        return wanted if len(wanted) else np.array([0])

    def _tensor(self, values: NDArray[Any] | Sequence[float]) -> torch.Tensor:
        return to_device(values, self._device)
