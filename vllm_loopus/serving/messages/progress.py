"""The worker's report to the scheduler about a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_loopus.serving.messages.blocks import TakenBlock
from vllm_loopus.serving.messages.stats import LoopStats


@dataclass
class PassTimes:
    """How long each pass of a step took on the device, in seconds; the mean where several ran as
    one call; None where that is not known (`step/clock.py`). `gap`, `host`: see `StepCosts`."""

    seconds: list[float | None] = field(default_factory=list)
    gap: float = 0.0
    host: float = 0.0

    def add(self, passes: int, seconds: float | None) -> Callable[[float | None], None]:
        """A call of `passes` that took `seconds` together. Returns what corrects this once the host
        has waited for its end."""
        first = len(self.seconds)

        def correct(seconds: float | None) -> None:
            each = None if seconds is None else seconds / passes
            self.seconds[first : first + passes] = [each] * passes

        self.seconds += [None] * passes
        correct(seconds)
        return correct


@dataclass
class LoopProgress:
    """The outcome of a step. Sequences that nothing is said about go on as they were.

    - `computed`: for requests that have nothing in flight and got no token, how many of their
      positions are computed. The next step continues there.
    - `in_flight`: requests with positions that have started and not finished.
    - `complete`: for requests with blocks that are newly complete at some depth, how many positions
      are complete at each depth. The prefix cache may have them.
    - `taken`: blocks that sequences took. `wanted`: how many blocks of deeper planes a sequence
      needs before it can continue, if any.
    - `exit_depths`: for each request that got a token, the depth at which it exited.
    - `further`: of those that got several tokens, the exit depths of the others.
    - `failed`: requests that cannot continue, and why. Of the other fields, only `taken` has them.
    - `stalled`: how often a sequence was left out of a pass for lack of blocks.
    - `boundary_rows`: rows of encoder and decoder together; 0 without a decoder call.
    - `times`: of the passes. `stats`: what the step adds to the metrics.
    """

    computed: dict[str, int] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    complete: dict[str, Sequence[int]] = field(default_factory=dict)
    taken: dict[str, list[TakenBlock]] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    exit_depths: dict[str, int] = field(default_factory=dict)
    further: dict[str, list[int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    stalled: int = 0
    boundary_rows: int = 0
    times: PassTimes = field(default_factory=PassTimes)
    stats: LoopStats = field(default_factory=LoopStats)
