"""The worker's report to the scheduler about a step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_loopus.serving.messages.blocks import TakenBlock
from vllm_loopus.serving.messages.stats import LoopStats


@dataclass
class PassTimes:
    """How long the passes of a step took on the host.

    - `seconds`: of each pass; the mean where several ran as one call.
    - `waited`: for each pass, whether it began on an idle device and the host waited for its end.
      Only then is the time what a pass costs.
    - `ended_idle`: whether the host waited for the end of the last pass. Otherwise some of its time
      is in the rest of the step.
    """

    seconds: list[float] = field(default_factory=list)
    waited: list[bool] = field(default_factory=list)
    ended_idle: bool = True


@dataclass
class LoopProgress:
    """The outcome of a step.

    - `computed`: for each scheduled request that got no token, how many of its positions count as
      computed. The next step continues there.
    - `in_flight`: those of them with positions that have started and not finished.
    - `complete`: for each request, how many positions are complete at each depth. The prefix cache
      may have them.
    - `taken`: blocks that sequences took. `wanted`: how many blocks of deeper planes a sequence
      needs before it can continue.
    - `exit_depths`: for each request that got a token, the depth at which it exited.
    - `failed`: requests that cannot continue, and why. Of the other fields, only `taken` has them.
    - `boundary_rows`: rows of encoder and decoder together; 0 without a decoder call.
    - `times`: of the passes. `stats`: what the step adds to the metrics.
    """

    computed: dict[str, int] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    complete: dict[str, Sequence[int]] = field(default_factory=dict)
    taken: dict[str, list[TakenBlock]] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    exit_depths: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    boundary_rows: int = 0
    times: PassTimes = field(default_factory=PassTimes)
    stats: LoopStats = field(default_factory=LoopStats)
