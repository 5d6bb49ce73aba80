"""When a step ends its passes and decodes those that have left: the quorum.

A boundary (decoder, LM head, sampling, scheduling, encoder) costs something whatever the number of
tokens, so it pays to wait for more sequences; those that have left wait idle meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_loopus.serving.knobs import AUTO
from vllm_loopus.serving.staircase import LoopedSequence


@dataclass(frozen=True)
class StepCosts:
    """What a pass and a boundary cost whatever the number of rows, in seconds (or any unit)."""

    per_pass: float = 2.0
    per_boundary: float = 1.0


class BoundaryRule(Protocol):
    def begin_step(self, costs: StepCosts | None) -> None:
        """A step begins; `costs` as measured so far, None while unknown."""
        ...

    def observe(self, sequence: LoopedSequence, depth: int) -> None:
        """A token in flight was decided upon at `depth`; its `exit_depth` is set if it left."""
        ...

    def ends(self, ready: int, running: Sequence[LoopedSequence]) -> bool:
        """After a pass: `ready` sequences wait for the decoder, `running` go on refining a token.

        Called with `ready >= 1` only.
        """
        ...


class FixedQuorum:
    """Ends the passes when a share of the sequences that want a token has left."""

    def __init__(self, share: float) -> None:
        self.share = share

    def begin_step(self, costs: StepCosts | None) -> None:
        pass

    def observe(self, sequence: LoopedSequence, depth: int) -> None:
        pass

    def ends(self, ready: int, running: Sequence[LoopedSequence]) -> bool:
        return ready >= int(self.share * (ready + len(running)))


class AutoQuorum:
    """Ends the passes when waiting longer would make a token dearer than it is now.

    With `k` sequences waiting of `n`, one more pass leaves `k / n` of its fixed cost unused; the
    boundary's fixed cost is shared by all who leave with it. Waiting goes on while the cost of one
    more pass for each sequence it is expected to bring is below the cost a leaving sequence bears
    now. Who leaves next is known from the request's budget, or learned: the share of tokens that
    left at a depth among those that reached it, recent ones counting more.
    """

    MEMORY = 0.998  # weight of the past after each observation at a depth

    def __init__(self, max_depth: int) -> None:
        self._left = [0.5] * (max_depth + 1)
        self._reached = [1.0] * (max_depth + 1)
        self._costs = StepCosts()
        self._idle = 0.0

    def begin_step(self, costs: StepCosts | None) -> None:
        self._costs = costs or self._costs
        self._idle = 0.0

    def observe(self, sequence: LoopedSequence, depth: int) -> None:
        if sequence.foregone_at(depth) is None and depth >= sequence.knobs.min_loops:
            self._left[depth] = self._left[depth] * self.MEMORY + (sequence.exit_depth == depth)
            self._reached[depth] = self._reached[depth] * self.MEMORY + 1

    def chance(self, sequence: LoopedSequence) -> float:
        """How likely the sequence is ready for the decoder after one more pass.

        Exit depths given for a replay are not looked at: they stand for what a model would decide.
        """
        depth = sequence.depth + 1
        if sequence.fills:
            return float(depth >= sequence.max_depth)
        if (leaves := sequence.foregone_at(depth)) is not None:
            return float(leaves)
        if depth < sequence.knobs.min_loops:
            return 0.0
        return self._left[depth] / self._reached[depth]

    def ends(self, ready: int, running: Sequence[LoopedSequence]) -> bool:
        if not running:
            return True
        expected = sum(map(self.chance, running))
        one_more = self._costs.per_pass * ready / (ready + len(running))
        so_far = (self._costs.per_boundary + self._idle) / ready
        if one_more >= so_far * expected:
            return True
        self._idle += one_more
        return False


def boundary_rule(exit_quorum: float | str, max_depth: int) -> BoundaryRule:
    """The rule for the engine option `exit_quorum`."""
    if exit_quorum == AUTO:
        return AutoQuorum(max_depth)
    assert not isinstance(exit_quorum, str)
    return FixedQuorum(exit_quorum)
