"""What the loop did, from the engine core to the metrics of the front end.

It is sent in `SchedulerStats.kv_connector_stats`, a mapping for KV connectors, which looped models
do not support. `LoopStats.received` removes it before vLLM's own loggers read the statistics. A
vLLM with a field for a model's statistics (`patches/loop-in-stat-loggers.diff`) gets it there.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

KEY = "loopus"
NEWEST = ("blocks", "sequences")  # of these the newest values count


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
      the greatest length fit, at `full` depth and at the `observed` one.
    - `guesses`: positions that began with a guessed token. `confirmed_guesses`,
      `rejected_guesses`: the depths at which those were guessed whose token is known since.
      `guess_rows`: rows of passes for guessed positions; `wasted_rows`: those of them in vain.
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
    guesses: int = 0
    confirmed_guesses: list[int] = field(default_factory=list)
    rejected_guesses: list[int] = field(default_factory=list)
    guess_rows: int = 0
    wasted_rows: int = 0
    blocks: list[int] = field(default_factory=list)
    sequences: dict[str, float] = field(default_factory=dict)

    def add(self, other: "LoopStats") -> None:
        """Adds the statistics of a later step."""
        for of in fields(self):
            mine, theirs = getattr(self, of.name), getattr(other, of.name)
            setattr(self, of.name, theirs or mine if of.name in NEWEST else mine + theirs)

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
