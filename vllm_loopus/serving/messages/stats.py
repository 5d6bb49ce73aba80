"""What the loop did, from the engine core to the metrics of the front end.

It is sent in `SchedulerStats.kv_connector_stats`, a mapping for KV connectors, which looped models
do not support. `LoopStats.received` removes it before vLLM's own loggers read the statistics. A
vLLM with a field for a model's statistics (`patches/loop-in-stat-loggers.diff`) gets it there.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KEY = "loopus"


@dataclass
class LoopStats:
    """Of one engine step, or of several added up.

    - `steps`: the number of passes of each step. `passes`: the number of rows of each pass.
    - `encoded_rows`: positions that entered the loop; at full depth each costs one row in every
      pass. `catch_up_rows`: rows of passes for positions before those in flight.
    - `decoder_rows`: rows of the decoder. `decoder_catch_up_rows`: those without a token.
    - `quorums`: at each decoding, the share of the sequences wanting a token that had exited.
    - `waiting`: sequences that had exited and waited for one more pass, summed over the passes.
    - `exit_depths`: of the tokens that went to the front end.
    - `nonfinite_requests`: requests that failed because of NaN or infinite states.
    - `blocks`: K/V blocks that running sequences hold, by depth. `sequences`: how many sequences of
      the greatest length fit, at `full` depth and at the `observed` one. Of these two, the newest
      values count.
    """

    steps: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    encoded_rows: int = 0
    catch_up_rows: int = 0
    decoder_rows: int = 0
    decoder_catch_up_rows: int = 0
    quorums: list[float] = field(default_factory=list)
    waiting: int = 0
    exit_depths: list[int] = field(default_factory=list)
    nonfinite_requests: int = 0
    blocks: list[int] = field(default_factory=list)
    sequences: dict[str, float] = field(default_factory=dict)

    def add(self, other: "LoopStats") -> None:
        """Adds the statistics of a later step."""
        self.steps += other.steps
        self.passes += other.passes
        self.encoded_rows += other.encoded_rows
        self.catch_up_rows += other.catch_up_rows
        self.decoder_rows += other.decoder_rows
        self.decoder_catch_up_rows += other.decoder_catch_up_rows
        self.quorums += other.quorums
        self.waiting += other.waiting
        self.exit_depths += other.exit_depths
        self.nonfinite_requests += other.nonfinite_requests
        self.blocks = other.blocks or self.blocks
        self.sequences = other.sequences or self.sequences

    def send_with(self, scheduler_stats: Any) -> None:
        """Puts them into vLLM's statistics of a step."""
        setattr(scheduler_stats, _field(scheduler_stats), {KEY: asdict(self)})

    @classmethod
    def received(cls, scheduler_stats: Any) -> "LoopStats | None":
        """Takes out what `send_with` put in; None if there is nothing."""
        carried = getattr(scheduler_stats, _field(scheduler_stats), None)
        if not isinstance(carried, Mapping) or KEY not in carried:
            return None
        setattr(scheduler_stats, _field(scheduler_stats), None)
        return cls(**carried[KEY])


def _field(scheduler_stats: Any) -> str:
    return "model_stats" if hasattr(scheduler_stats, "model_stats") else "kv_connector_stats"
