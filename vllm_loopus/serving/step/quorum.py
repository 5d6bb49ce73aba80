"""When a step ends its passes and decodes the sequences that have exited: the quorum.

A boundary (decoder, LM head, sampling, scheduling, encoder) has a fixed cost that does not depend
on the number of tokens, so it is worthwhile to wait until more sequences have exited. Those that
have exited are idle meanwhile.
"""

from typing import Protocol

import numpy as np

from vllm_loopus.serving.knobs.engine import AUTO
from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.step.chunks import Bools, Ints
from vllm_loopus.serving.step.staircase import UNKNOWN, Staircases


class Quorum(Protocol):
    """Decides after each pass whether the step continues."""

    def begin_step(self, costs: StepCosts | None) -> None:
        """A step begins. `costs`: as measured so far, None while unknown."""
        ...

    def observe(self, stairs: Staircases, sequences: Ints, depth: Ints, exits: Bools) -> None:
        """The exit rule was asked about the tokens of `sequences` [n] at `depth` [n], and `exits`
        [n] is what it said."""
        ...

    def ends(self, ready: int, stairs: Staircases, running: Ints) -> bool:
        """Whether the passes end now. `ready` sequences, at least 1, wait for the decoder; those
        `running` are still refining a token."""
        ...

    def exits_expected(self, stairs: Staircases, running: Ints) -> float:
        """How many of the sequences `running` are expected to exit in the next pass."""
        ...

    def foresees(self, ready: int, stairs: Staircases, passing: Ints, called: bool = False) -> bool:
        """Whether to launch the decoder before the exits of the pass under way are read. In it are
        `passing`, at the depths that they reach in it; `ready` have exited before. `called`: the
        decoder runs in any case, for guesses."""
        ...

    def chain(self, stairs: Staircases, running: Ints) -> int:
        """How many passes to launch before exits are read. `running` take part."""
        ...


class FixedQuorum:
    """Ends the passes when a share of the sequences that want a token has exited."""

    def __init__(self, share: float) -> None:
        self.share = share

    def begin_step(self, costs: StepCosts | None) -> None:
        pass

    def observe(self, stairs: Staircases, sequences: Ints, depth: Ints, exits: Bools) -> None:
        pass

    def ends(self, ready: int, stairs: Staircases, running: Ints) -> bool:
        return ready >= int(self.share * (ready + len(running)))

    def exits_expected(self, stairs: Staircases, running: Ints) -> float:
        return float(len(running))

    def foresees(self, ready: int, stairs: Staircases, passing: Ints, called: bool = False) -> bool:
        return False  # the share is a promise

    def chain(self, stairs: Staircases, running: Ints) -> int:
        return 1


class AutoQuorum:
    """Ends the passes when waiting longer would make a token more expensive than it is now.

    With `k` of `n` sequences waiting, one more pass wastes `k / n` of its fixed cost; the fixed
    cost of the boundary is shared by all who exit with it. Waiting continues while the cost of one
    more pass, for each sequence it is expected to bring, is below the cost that a ready sequence
    bears now. Whether a sequence exits next is known from the request's budget, or learned: the
    share of the tokens that exited at a depth among those that reached it. Recent tokens count
    more.
    """

    LONGEST_CHAIN = 3
    PATIENCE = 1.1  # by how much a chain has to be better: its estimate is rough
    WORTHWHILE = 0.5  # tokens for which a decoder call that guesses is one that samples too
    MEMORY = 0.998  # weight of the past after each observation at a depth

    def __init__(self, max_depth: int) -> None:
        self._exited = np.full(max_depth + 1, 0.5)
        self._reached = np.ones(max_depth + 1)
        self._costs = StepCosts()
        self._measured = False
        self._idle = 0.0

    def begin_step(self, costs: StepCosts | None) -> None:
        self._costs = costs or self._costs
        self._measured = self._measured or costs is not None
        self._idle = 0.0

    def observe(self, stairs: Staircases, sequences: Ints, depth: Ints, exits: Bools) -> None:
        asked = depth >= stairs.min_loops[sequences]
        exited = asked & exits
        size = len(self._reached)
        reached = np.bincount(depth[asked], minlength=size)
        keep = self.MEMORY**reached
        self._exited = self._exited * keep + np.bincount(depth[exited], minlength=size)
        self._reached = self._reached * keep + reached

    def chances(self, stairs: Staircases, sequences: Ints) -> np.ndarray:
        """How likely each sequence is ready for the decoder after one more pass.

        Exit depths given for a replay are ignored, because they simulate the decisions of a model.
        """
        return self._chances_at(stairs, sequences, stairs.depth[sequences] + 1)

    def _chances_at(self, stairs: Staircases, sequences: Ints, depth: Ints) -> np.ndarray:
        depth = np.minimum(depth, stairs.num_depths)
        known = stairs.predetermined_at(sequences, depth)
        learned = self._exited[depth] / self._reached[depth]
        learned = np.where(depth < stairs.min_loops[sequences], 0.0, learned)
        chances = np.where(known == UNKNOWN, learned, known)
        if not (fills := stairs.fills(sequences)).any():
            return chances
        # They may have exited before, and are ready at their last planes.
        chances = np.where(fills & (stairs.exit_depth[sequences] > 0), 1.0, chances)
        return np.where(fills & (depth < stairs.last_plane(sequences)), 0.0, chances)

    def exits_expected(self, stairs: Staircases, running: Ints) -> float:
        return float(self.chances(stairs, running).sum())

    def foresees(self, ready: int, stairs: Staircases, passing: Ints, called: bool = False) -> bool:
        if not self._measured:
            return False
        exiting = self._chances_at(stairs, passing, stairs.depth[passing])
        # The way to the decoder, and about as much of the way to the next pass.
        saved = 2 * self._costs.gap
        if called:  # a step that samples nothing costs the host more than it spares
            return ready + float(exiting.sum()) >= self.WORTHWHILE
        nobody = 0.0 if ready else float(np.prod(1 - exiting))
        return ready + float(exiting.sum()) >= 1 and nobody * self._costs.per_boundary <= saved

    def chain(self, stairs: Staircases, running: Ints) -> int:
        if not len(running) or not self._measured:
            return 1
        stay = 1 - self.exits_expected(stairs, running) / len(running)

        one = self._costs.per_pass + self._costs.per_row * len(running)

        def rate(passes: int) -> float:
            device = passes * one + self._costs.per_boundary
            better = self.PATIENCE if passes == 1 else 1.0
            return better * float(1 - stay**passes) / max(device, self._costs.host)

        return max(range(1, self.LONGEST_CHAIN + 1), key=rate)

    def ends(self, ready: int, stairs: Staircases, running: Ints) -> bool:
        if not len(running):
            return True
        one_more = self._costs.per_pass * ready / (ready + len(running))
        so_far = (self._costs.per_boundary + self._idle) / ready
        if one_more >= so_far * self.exits_expected(stairs, running):
            return True
        self._idle += one_more
        return False


def quorum_for(exit_quorum: float | str, max_depth: int) -> Quorum:
    """The rule for the engine option `exit_quorum`."""
    if exit_quorum == AUTO:
        return AutoQuorum(max_depth)
    assert not isinstance(exit_quorum, str)
    return FixedQuorum(exit_quorum)
