"""The computing of a step: encoder, passes and decoder over paged rows, through vLLM's attention.

Knows no model runner: it is given the model, block tables and a metadata builder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.serving.attention import Through
from vllm_loopus.serving.batch_layout import BatchLayout
from vllm_loopus.serving.exits import Exits
from vllm_loopus.serving.pages import PageTables
from vllm_loopus.serving.planes import KeptRows
from vllm_loopus.serving.regions import Ran, Regions
from vllm_loopus.serving.staircase import Rows
from vllm_loopus.serving.states import StatePages
from vllm_loopus.serving.transfer import to_device
from vllm_loopus.serving.verdicts import Verdicts, cleanse


@dataclass
class Decoded:
    """Decoder output of a step: normed hidden states of the newest positions, and whose they are.

    `prompts`: hidden states [P, H] of all prompt positions at the exit depth, for sequences that
    want log-probabilities of their prompt.
    """

    hidden: torch.Tensor | None = None  # [len(request_ids), H]
    request_ids: list[str] = field(default_factory=list)
    prompts: dict[str, torch.Tensor] = field(default_factory=dict)

    def in_order(self, request_ids: Sequence[str]) -> torch.Tensor:
        """Hidden states of `request_ids`, all of those decoded, in their order."""
        assert self.hidden is not None
        row = {request_id: index for index, request_id in enumerate(self.request_ids)}
        order = [row[request_id] for request_id in request_ids]
        if order == list(range(len(self.request_ids))):
            return self.hidden
        return self.hidden.index_select(0, to_device(order, self.hidden.device))


class PagedExecutor:
    """`StepExecutor` over vLLM's paged memory."""

    def __init__(
        self,
        model: Any,
        vllm_config: VllmConfig,
        tables: PageTables,
        attention_group: Any,
        device: torch.device,
    ) -> None:
        """`model`: our vLLM model, K/V bound. `attention_group`: any of the runner's groups; all
        depths have the same K/V shape, so one builder serves them all."""
        config: LoopUSConfig = vllm_config.model_config.hf_config
        self._model = model
        self._tables = tables
        self._device = device
        self._regions = Regions(model, vllm_config, attention_group, tables.block_size, device)
        self._verdicts = Verdicts(get_tp_group())
        self._exits = Exits(model, HaltingRule.from_config(config), self._verdicts, device)
        self._states = StatePages(model.planes.state_pages(), config.hidden_size)
        self._tokens: list[int] = []
        self._encoded: torch.Tensor | None = None
        # Of this step, and its states as they would be read from the pages. With graphs they lie in
        # the output of one: nothing runs between two passes, and a graph's input is a copy. Each
        # step ends with `decode` or `settle`, which drop them.
        self._last_pass: tuple[BatchLayout, torch.Tensor] | None = None
        self._prompt_parts: dict[str, list[torch.Tensor]] = {}
        self.decoded = Decoded()

    def begin_step(self, tokens: list[int]) -> None:
        """`tokens`: ids of the new positions, in order."""
        self._tokens = tokens
        self.decoded = Decoded()

    def want_prompt(self, request_id: str) -> None:
        """The prompt's hidden states are to be given with the first token. The sequence must go
        through the decoder from its first position."""
        self._prompt_parts[request_id] = []

    def capture(self) -> int:
        """Captures the graphs of the regions; bytes that they take."""
        return self._regions.capture()

    def forget(self, request_id: str) -> None:
        """Drops what was kept for a request."""
        self._prompt_parts.pop(request_id, None)

    def make_room(self, rows: Rows) -> int:
        return self._tables.make_room(rows)

    def encode(self, rows: list[Rows]) -> None:
        layout = self._tables.layout([Rows(r.sequence, 1, r.start, r.end) for r in rows])
        ids = self._tensor(np.array(self._tokens, dtype=np.int32))
        (self._encoded,) = self._regions.encoder(layout, ids).outputs

    def make_room_below(self, rows: list[Rows], passes: int) -> int:
        return self._tables.make_room_below(rows, passes)

    def run_passes(self, rows: list[Rows], passes: int, deciding: list[int]) -> list[bool]:
        *above, layout = layouts = self._tables.layouts(rows, passes)
        state = self._previous_states(layouts[0])
        for shallower in above:
            _, state = self._run_pass(shallower, state)
        region = self._regions.reasoning
        may_leave = self._may_leave(rows, deciding)
        # Written once they have left; a graph holds nothing back and writes for all that may.
        late = may_leave if may_leave and not region.replays(layout) else []
        now = [] if late else may_leave
        through = self._through(now, self._deeper(now, rows), layout)
        kept_rows = self._tensor(layout.spans.last_rows[late]) if late else None
        with self._model.planes.keeping(kept_rows) as kept:
            ran, after = self._run_pass(layout, state, through)
        self._last_pass = layout, after
        state, (update, new_state) = ran.rows, ran.outputs
        # What is no number stays so: these tell of the passes before as well.
        self._verdicts.watch(rows, layout, new_state)
        leaves = self._exits.after(rows, deciding, layout, update, state, new_state)
        if kept is not None:
            word = dict(zip(deciding, leaves, strict=True))
            left = [i for i in late if rows[i].sequence.leaves_at(rows[i].depth, word[i])]
            self._write_deeper(left, rows, layout, new_state, kept)
        return leaves

    def _run_pass(
        self, layout: BatchLayout, state: torch.Tensor, through: Through | None = None
    ) -> tuple[Ran, torch.Tensor]:
        """One pass from `state` [T, H] to the depths of `layout`. Keeps the states that come out,
        and gives them as they would be read."""
        ran = self._regions.reasoning(layout, state, through)
        new_state = ran.outputs[1]
        self._states.write(ran.slots, new_state)
        if ran.repeated is not None and ran.more_slots is not None:
            self._states.write(ran.more_slots, new_state.index_select(0, ran.repeated))
        return ran, self._states.as_read(new_state)

    @staticmethod
    def _may_leave(rows: list[Rows], deciding: list[int]) -> list[int]:
        """Entries whose newest row gives its K/V to deeper depths if it leaves, and may leave."""
        return [
            index
            for index in deciding
            if rows[index].sequence.writes_through
            and rows[index].depth < rows[index].sequence.max_depth
            and rows[index].sequence.foregone_at(rows[index].depth) is not False
        ]

    def _write_deeper(
        self,
        left: list[int],
        rows: list[Rows],
        layout: BatchLayout,
        states: torch.Tensor,
        kept: KeptRows,
    ) -> None:
        """K/V and states go to deeper depths for the entries that have left."""
        through = self._through(left, self._deeper(left, rows), layout)
        if through is None:
            return
        repeated, slots = self._tensor(through.rows), self._tensor(through.slots)
        self._states.write(slots, states.index_select(0, repeated))
        kept.write(repeated, slots)

    def _previous_states(self, layout: BatchLayout) -> torch.Tensor:
        """`h^{r-1}` of all rows: fresh from the encoder, left by the last pass, or from the pages
        of the depth below."""
        last, self._last_pass = self._last_pass, None
        if last is not None and layout.follows(last[0]):
            return last[1]
        spans, depth = layout.spans, layout.depth
        fresh = int(spans.offsets[np.count_nonzero(depth == 1)])
        if fresh == len(spans):
            assert self._encoded is not None
            return self._encoded
        # Depth 0 has no pages: depth 1 stands in for the fresh rows, which are cut off.
        slots = layout.slots(np.maximum(depth - 1, 1))[fresh:]
        stored = self._states.read(self._tensor(slots))
        if not fresh:
            return stored
        assert self._encoded is not None
        return torch.cat([self._encoded, stored])

    def settle(self) -> None:
        self._last_pass = None
        self._verdicts.settle()

    def cleanse(self, request_id: str) -> None:
        """Leaves nothing but numbers in the blocks of a sequence that failed."""
        cleanse(self._model.planes.caches(), self._tables.blocks(request_id))

    def decode(self, rows: list[Rows]) -> None:
        self._last_pass = None
        layout = self._tables.layout(rows)
        states = self._states.read(self._tensor(layout.own_slots))
        through = [i for i, row in enumerate(rows) if row.newest and row.sequence.writes_through]
        others = [rows[i].sequence.other_exits(rows[i].depth) for i in through]
        (hidden,) = self._regions.decoder(
            layout,
            states,
            self._through(through, others, layout),
            wanted=self._wanted(rows, layout),
            keeps=any(entry.sequence.request_id in self._prompt_parts for entry in rows),
        ).outputs
        self._verdicts.watch(rows, layout, hidden, "in the decoder ")
        self._verdicts.settle()
        for index, entry in enumerate(rows):
            if entry.sequence.failure:
                continue
            self._tables.mark_decoded(entry)
            name = entry.sequence.request_id
            if name in self._prompt_parts:
                part = hidden[slice(*layout.spans.offsets[index : index + 2])]
                self._prompt_parts[name].append(part)
                if entry.newest:
                    self.decoded.prompts[name] = torch.cat(self._prompt_parts.pop(name))
        newest = [i for i, entry in enumerate(rows) if entry.newest and not entry.sequence.failure]
        if newest:
            self.decoded.hidden = hidden.index_select(
                0, self._tensor(layout.spans.last_rows[newest])
            )
            self.decoded.request_ids = [rows[index].sequence.request_id for index in newest]

    def _wanted(self, rows: list[Rows], layout: BatchLayout) -> NDArray[np.int64] | None:
        """Rows [M] of the decoder whose hidden states are used: newest, and prompts to score.

        None for all. At least one row, for layers that cannot run on none.
        """
        if len(rows) == len(layout.spans) and all(entry.newest for entry in rows):
            return None
        offsets = layout.spans.offsets
        parts = [
            np.arange(start, end)
            if entry.sequence.request_id in self._prompt_parts
            else np.arange(end - entry.newest, end)
            for entry, start, end in zip(rows, offsets, offsets[1:], strict=False)
        ]
        wanted = np.concatenate(parts)
        if len(wanted) == len(layout.spans):
            return None
        return wanted if len(wanted) else np.array([0])

    @staticmethod
    def _through(
        entries: list[int], depths: Sequence[Sequence[int]], layout: BatchLayout
    ) -> Through | None:
        """The last rows of `entries` go to the `depths` of each too."""
        if not any(depths):
            return None
        return Through(*layout.through(entries, depths))

    @staticmethod
    def _deeper(entries: list[int], rows: list[Rows]) -> list[Sequence[int]]:
        """The depths below those of `entries`."""
        return [range(rows[i].depth + 1, rows[i].sequence.max_depth + 1) for i in entries]

    def _tensor(self, values: np.ndarray[Any, Any] | Sequence[float]) -> torch.Tensor:
        return to_device(values, self._device)
