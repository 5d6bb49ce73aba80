"""When a step ends its passes and decodes those that have left: the quorum."""

from collections.abc import Sequence
from typing import Protocol

from vllm_loopus.serving.staircase import LoopedSequence


class BoundaryRule(Protocol):
    def ends(self, ready: int, running: Sequence[LoopedSequence]) -> bool:
        """After a pass: `ready` sequences wait for the decoder, `running` go on refining a token.

        Called with `ready >= 1` only.
        """
        ...


class FixedQuorum:
    """Ends the passes when a share of the sequences that want a token has left."""

    def __init__(self, share: float) -> None:
        self.share = share

    def ends(self, ready: int, running: Sequence[LoopedSequence]) -> bool:
        return ready >= int(self.share * (ready + len(running)))


def boundary_rule(exit_quorum: float | str) -> BoundaryRule:
    """The rule for the engine option `exit_quorum`."""
    return FixedQuorum(0.25 if isinstance(exit_quorum, str) else exit_quorum)
