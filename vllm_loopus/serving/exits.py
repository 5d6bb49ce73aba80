"""Who leaves after a pass: the halting rule over rows of many sequences."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.serving.batch_layout import BatchLayout
from vllm_loopus.serving.staircase import LoopedSequence, Rows
from vllm_loopus.serving.transfer import to_device
from vllm_loopus.serving.verdicts import Verdicts


class Exits:
    """Asks the confidence head after passes in which it has a say in one of the rows at least
    (`HaltingRule.foregone`)."""

    def __init__(
        self, model: Any, rule: HaltingRule, verdicts: Verdicts, device: torch.device
    ) -> None:
        """`rule`: the checkpoint's; each sequence has knobs of its own."""
        self._model = model
        self._rule = rule
        self._verdicts = verdicts
        self._device = device

    def after(
        self,
        rows: Sequence[Rows],
        deciding: Sequence[int],
        layout: BatchLayout,
        update: torch.Tensor,
        before: torch.Tensor,
        after: torch.Tensor,
    ) -> list[bool]:
        """The rule's word for the newest positions of the entries `deciding` [S] of `rows`.

        `update`, `before`, `after`: `u^r`, `h^{r-1}` and `h^r` of all rows [T, H]. Notes what a
        sequence adds up (`survival`). Waits for the device once, also where the head is not asked:
        what a pass takes is measured by the host (`StepClock`).
        """
        if not deciding:
            return []
        sequences = [rows[index].sequence for index in deciding]
        known = [_foregone(rows[index]) for index in deciding]
        words = [leaves for leaves in known if leaves is not None]
        if len(words) == len(deciding):
            self._verdicts.settle()
            return words
        if len(deciding) < len(layout.spans):
            last = self._tensor(layout.spans.last_rows[deciding])
            update, before, after = (of.index_select(0, last) for of in (update, before, after))
        leaves, survival = self._with_knobs(sequences).leaves(
            self._tensor(layout.depth[deciding]),
            confidence=self._model.confidence(update, before, after),
            step_length=torch.linalg.vector_norm((after - before).float(), dim=-1),
            survival=self._tensor([s.survival for s in sequences]),
        )
        accumulates = self._rule.strategy == "cdf"  # the others leave the survival as it is
        leaving, survived = self._verdicts.read(leaves, survival if accumulates else None)
        if accumulates:
            for sequence, value in zip(sequences, survived, strict=True):
                sequence.survival = value
        return leaving

    def _with_knobs(self, sequences: Sequence[LoopedSequence]) -> HaltingRule:
        """The rule for one row of each of `sequences` [S]."""
        knobs = [sequence.knobs for sequence in sequences]
        return replace(
            self._rule,
            exit_threshold=self._tensor([k.exit_threshold for k in knobs]),
            min_loops=self._tensor([k.min_loops for k in knobs]),
            max_loops=self._tensor([k.max_loops for k in knobs]),
        )

    def _tensor(self, values: NDArray[np.int64] | Sequence[float]) -> torch.Tensor:
        return to_device(values, self._device)


def _foregone(rows: Rows) -> bool | None:
    """The word for a newest position that nothing computed has a say in; with an exit depth given,
    any will do."""
    if rows.sequence.forced_depth is not None:
        return False
    return rows.sequence.foregone_at(rows.depth)
