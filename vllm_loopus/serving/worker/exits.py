"""Which sequences exit after a pass: the exit rule over rows of many sequences."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_loopus.modeling.exit_rule import ExitRule
from vllm_loopus.serving.model.seam import LoopedModel
from vllm_loopus.serving.step.staircase import Chunk, LoopedSequence
from vllm_loopus.serving.worker.row_layout import RowLayout
from vllm_loopus.serving.worker.transfer import to_device
from vllm_loopus.serving.worker.verdicts import Verdicts


class Exits:
    """Asks the model for its evidence after passes in which it can decide for at least one row
    (`ExitRule.predetermined`)."""

    def __init__(
        self, model: LoopedModel, rule: ExitRule, verdicts: Verdicts, device: torch.device
    ) -> None:
        """`rule`: that of the checkpoint; each sequence has knobs of its own."""
        self._model = model
        self._rule = rule
        self._verdicts = verdicts
        self._device = device

    def after(
        self,
        chunks: Sequence[Chunk],
        deciding: Sequence[int],
        layout: RowLayout,
        observed: torch.Tensor,
    ) -> list[bool]:
        """What the rule decides for the newest positions of the chunks `deciding` [S].

        `observed` [T, E]: what the pass gave to look at, for all rows. Stores what the rule carries
        in each sequence. Waits for the device once, even if no evidence is needed, so that the host
        can measure what a pass takes (`StepClock`).
        """
        if not deciding:
            return []
        known = [_predetermined(chunks[index]) for index in deciding]
        decisions = [exits for exits in known if exits is not None]
        if len(decisions) == len(deciding):
            self._verdicts.check_states()
            return decisions
        if len(deciding) < len(layout.spans):
            last = self._tensor(layout.spans.last_rows[deciding])
            observed = observed.index_select(0, last)
        sequences = [chunks[index].sequence for index in deciding]
        exits, carry = self._with_knobs(sequences).exits(
            self._tensor(layout.depth[deciding]),
            self._model.exit_evidence(observed),
            self._carry(sequences),
        )
        exiting, carried = self._verdicts.read(exits, carry)
        if carried.size:
            for sequence, values in zip(sequences, carried.tolist(), strict=True):
                sequence.carry = tuple(values)
        return exiting

    def _carry(self, sequences: Sequence[LoopedSequence]) -> torch.Tensor:
        """What the rule carries for each of `sequences`, float32 [S, C]."""
        values = np.array([sequence.carry for sequence in sequences], dtype=np.float32)
        return self._tensor(values.reshape(len(sequences), -1))

    def _with_knobs(self, sequences: Sequence[LoopedSequence]) -> ExitRule:
        """The rule for one row of each of `sequences` [S]."""
        knobs = [sequence.knobs for sequence in sequences]
        return self._rule.with_knobs(
            exit_threshold=self._tensor([k.exit_threshold for k in knobs]),
            min_loops=self._tensor([k.min_loops for k in knobs]),
            max_loops=self._tensor([k.max_loops for k in knobs]),
        )

    def _tensor(self, values: NDArray[Any] | Sequence[float]) -> torch.Tensor:
        return to_device(values, self._device)


def _predetermined(chunk: Chunk) -> bool | None:
    """The decision for a newest position that no evidence can change. With an exit depth given, the
    rule's decision does not matter."""
    if chunk.sequence.forced_depth is not None:
        return False
    return chunk.sequence.predetermined_at(chunk.depth)
