"""Which sequences exit after a pass: the exit rule over rows of many sequences."""

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_loopus.modeling.exit_rule import ExitRule
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.model.seam import LoopedModel
from vllm_loopus.serving.step.chunks import Bools, Ints
from vllm_loopus.serving.worker.transfer import all_to_device


class Exits:
    """Asks the model for its evidence after passes in which it can decide for at least one row
    (`ExitRule.predetermined`).

    The knobs of all sequences, and what the rule carries from pass to pass, stay on the device, by
    the row of the sequence.
    """

    def __init__(
        self, model: LoopedModel, rule: ExitRule, device: torch.device, slots: int = 1
    ) -> None:
        """`rule`: that of the checkpoint; each sequence has knobs of its own. `slots`: positions of
        one sequence that may be in flight."""
        self._model = model
        self._rule = rule
        self._device = device
        self._first_carry = torch.tensor(rule.first_carry, device=device)
        self._carry = torch.zeros(0, len(rule.first_carry), device=device)
        self._knobs = np.zeros((3, 8), dtype=np.float32)  # threshold, min_loops, max_loops
        self._slots = slots
        self._asked = np.zeros((8, slots), dtype=np.int64)  # number of what was asked about last
        self._with_knobs: tuple[Ints, ExitRule] | None = None  # for these sequences

    def add(self, index: int, knobs: RequestKnobs) -> None:
        """A sequence gets the row `index`."""
        if index >= len(self._asked):
            more = max(index + 1, 2 * len(self._asked)) - len(self._asked)
            self._knobs = np.pad(self._knobs, ((0, 0), (0, more)))
            self._asked = np.pad(self._asked, ((0, more), (0, 0)))
        self._knobs[:, index] = knobs.exit_threshold, knobs.min_loops, knobs.max_loops
        self._asked[index] = 0
        self._with_knobs = None

    def after(
        self,
        sequences: Ints,
        position: Ints,
        numbers: Ints,
        depth: Ints,
        rows: Ints | None,
        observed: torch.Tensor,
    ) -> torch.Tensor:
        """What the rule decides for the positions `position` [S] of `sequences` [S] at `depth`
        [S]: a mask [S] on the device. `numbers` [S]: of their beginnings, which tell apart guesses
        of the same position.

        `observed` [T, E]: what the pass gave to look at; `rows` [S] those of the newest positions,
        None for all, in order.
        """
        place = position % self._slots
        first = self._asked[sequences, place] != numbers
        self._asked[sequences, place] = numbers
        known = self._with_knobs
        fresh_knobs = known is None or not np.array_equal(known[0], sequences)
        sent: list[NDArray[np.generic]] = [depth, *([] if rows is None else [rows])]
        if self._first_carry.numel():
            sent += [sequences * self._slots + place, first]
        if fresh_knobs:
            sent.append(self._knobs[:, sequences])
        there = all_to_device(sent, self._device)
        if fresh_knobs:
            threshold, min_loops, max_loops = there.pop()
            rule = self._rule.with_knobs(
                exit_threshold=threshold, min_loops=min_loops, max_loops=max_loops
            )
            self._with_knobs = sequences, rule
        else:
            assert known is not None
            rule = known[1]
        if rows is not None:
            observed = observed.index_select(0, there.pop(1))
        if not self._first_carry.numel():
            carry = self._first_carry.expand(len(sequences), -1)
            return rule.exits(there[0], self._model.exit_evidence(observed), carry)[0]
        depths, index, begins = there
        if (missing := self._asked.size - len(self._carry)) > 0:
            self._carry = torch.cat([self._carry, self._first_carry.expand(missing, -1)])
        carry = torch.where(begins[:, None], self._first_carry, self._carry.index_select(0, index))
        exits, carry = rule.exits(depths, self._model.exit_evidence(observed), carry)
        self._carry.index_copy_(0, index, carry)
        return exits


def deeper_than(depth: Ints, last: Ints, num_depths: int) -> Bools:
    """The depths deeper than `depth` [K], up to `last` [K]: a mask [K, N + 1]."""
    every = np.arange(num_depths + 1)
    return (every > depth[:, None]) & (every <= last[:, None])
