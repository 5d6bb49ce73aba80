"""What the loop did, from the engine core to the metrics of the front end.

It travels in `SchedulerStats.kv_connector_stats`, a mapping that vLLM keeps for KV connectors,
which LoopUS models refuse; `LoopStats.received` takes it out before vLLM's own loggers look. A vLLM
with a field for it (`patches/loop-in-stat-loggers.diff`) is given it there.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_loopus.serving.step import StepReport

KEY = "loopus"


@dataclass
class LoopStats:
    """Of one engine step, or of several added up.

    - `steps`: passes of each step; `passes`: rows of each pass.
    - `encoded_rows`: positions that entered the loop; at full depth each would cost a row in every
      one of the passes. `catch_up_rows`: rows for positions before those.
    - `decoder_rows`: rows of the decoder; `decoder_catch_up_rows`: those without a token of theirs.
    - `quorums`: share of the sequences wanting a token that had left, at each decoding.
    - `waiting`: sequences that had left and sat through one more pass, summed over passes.
    - `nonfinite_requests`: requests that failed for NaN or infinite states.
    - `blocks`: K/V blocks held by running sequences, by depth. `sequences`: of the longest served,
      how many fit at `full` depth and at the `observed` one. The newest values count.
    """

    steps: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    encoded_rows: int = 0
    catch_up_rows: int = 0
    decoder_rows: int = 0
    decoder_catch_up_rows: int = 0
    quorums: list[float] = field(default_factory=list)
    waiting: int = 0
    nonfinite_requests: int = 0
    blocks: list[int] = field(default_factory=list)
    sequences: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_step(cls, report: "StepReport") -> "LoopStats":
        decodes = report.ready > 0
        return cls(
            steps=[len(report.passes)],
            passes=list(report.passes),
            encoded_rows=report.encoded_rows,
            catch_up_rows=report.catch_up_rows,
            decoder_rows=report.decoder_rows,
            decoder_catch_up_rows=report.decoder_rows - len(report.emitted),
            quorums=[report.ready / report.wanting] if decodes else [],
            waiting=report.waiting,
        )

    def add(self, other: "LoopStats") -> None:
        """Adds a later step's."""
        self.steps += other.steps
        self.passes += other.passes
        self.encoded_rows += other.encoded_rows
        self.catch_up_rows += other.catch_up_rows
        self.decoder_rows += other.decoder_rows
        self.decoder_catch_up_rows += other.decoder_catch_up_rows
        self.quorums += other.quorums
        self.waiting += other.waiting
        self.nonfinite_requests += other.nonfinite_requests
        self.blocks = other.blocks or self.blocks
        self.sequences = other.sequences or self.sequences

    def send_with(self, scheduler_stats: Any) -> None:
        """Puts them into vLLM's statistics of a step."""
        setattr(scheduler_stats, _field(scheduler_stats), {KEY: asdict(self)})

    @classmethod
    def received(cls, scheduler_stats: Any) -> "LoopStats | None":
        """Takes them out again; None when there are none."""
        carried = getattr(scheduler_stats, _field(scheduler_stats), None)
        if not isinstance(carried, Mapping) or KEY not in carried:
            return None
        setattr(scheduler_stats, _field(scheduler_stats), None)
        return cls(**carried[KEY])


def _field(scheduler_stats: Any) -> str:
    return "model_stats" if hasattr(scheduler_stats, "model_stats") else "kv_connector_stats"
