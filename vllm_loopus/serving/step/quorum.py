"""When a step ends its passes and decodes the sequences that have exited: the quorum.

A boundary (decoder, LM head, sampling, scheduling, encoder) has a fixed cost that does not depend
on the number of tokens, so it is worthwhile to wait until more sequences have exited. Those that
have exited are idle meanwhile.
"""

from collections.abc import Sequence
from typing import Protocol

from vllm_loopus.serving.knobs.engine import AUTO
from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.step.staircase import LoopedSequence


class Quorum(Protocol):
    """Decides after each pass whether the step continues."""

    def begin_step(self, costs: StepCosts | None) -> None:
        """A step begins. `costs`: as measured so far, None while unknown."""
        ...

    def observe(self, sequence: LoopedSequence, depth: int) -> None:
        """The exit rule was asked about a token at `depth`; if it exits there, its `exit_depth` is
        set."""
        ...

    def ends(self, ready: int, running: Sequence[LoopedSequence]) -> bool:
        """Whether the passes end now. `ready` sequences, at least 1, wait for the decoder;
        `running` are still refining a token."""
        ...


class FixedQuorum:
    """Ends the passes when a share of the sequences that want a token has exited."""

    def __init__(self, share: float) -> None:
        self.share = share

    def begin_step(self, costs: StepCosts | None) -> None:
        pass

    def observe(self, sequence: LoopedSequence, depth: int) -> None:
        pass

    def ends(self, ready: int, running: Sequence[LoopedSequence]) -> bool:
        return ready >= int(self.share * (ready + len(running)))


class AutoQuorum:
    """Ends the passes when waiting longer would make a token more expensive than it is now.

    With `k` of `n` sequences waiting, one more pass wastes `k / n` of its fixed cost; the fixed
    cost of the boundary is shared by all who exit with it. Waiting continues while the cost of one
    more pass, for each sequence it is expected to bring, is below the cost that a ready sequence
    bears now. Whether a sequence exits next is known from the request's budget, or learned: the
    share of the tokens that exited at a depth among those that reached it. Recent tokens count
    more.
    """

    MEMORY = 0.998  # weight of the past after each observation at a depth

    def __init__(self, max_depth: int) -> None:
        self._exited = [0.5] * (max_depth + 1)
        self._reached = [1.0] * (max_depth + 1)
        self._costs = StepCosts()
        self._idle = 0.0

    def begin_step(self, costs: StepCosts | None) -> None:
        self._costs = costs or self._costs
        self._idle = 0.0

    def observe(self, sequence: LoopedSequence, depth: int) -> None:
        if sequence.predetermined_at(depth) is None and depth >= sequence.knobs.min_loops:
            self._exited[depth] = self._exited[depth] * self.MEMORY + (sequence.exit_depth == depth)
            self._reached[depth] = self._reached[depth] * self.MEMORY + 1

    def chance(self, sequence: LoopedSequence) -> float:
        """How likely the sequence is ready for the decoder after one more pass.

        Exit depths given for a replay are ignored, because they simulate the decisions of a model.
        """
        depth = sequence.depth + 1
        if sequence.fills:
            return float(depth >= sequence.max_depth)
        if (exits := sequence.predetermined_at(depth)) is not None:
            return float(exits)
        if depth < sequence.knobs.min_loops:
            return 0.0
        return self._exited[depth] / self._reached[depth]

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


def quorum_for(exit_quorum: float | str, max_depth: int) -> Quorum:
    """The rule for the engine option `exit_quorum`."""
    if exit_quorum == AUTO:
        return AutoQuorum(max_depth)
    assert not isinstance(exit_quorum, str)
    return FixedQuorum(exit_quorum)
