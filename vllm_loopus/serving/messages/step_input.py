"""The scheduler's input to the worker for a step.

Our scheduler adds a `LoopSchedule` to vLLM's `SchedulerOutput`. The adapter of a model runner
(`runners/`) turns both into a `StepInput`, the same for every runner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.messages.blocks import BlockIds, BlockOffer
from vllm_loopus.serving.messages.costs import StepCosts

ATTRIBUTE = "loopus"  # of a SchedulerOutput: the LoopSchedule


@dataclass(frozen=True)
class LoopSchedule:
    """What our scheduler adds to vLLM's output of a step.

    - `offer`: free blocks for deeper planes.
    - `costs`: measured in the scheduler and sent, so that all ranks decide alike; None if unknown.
    - `seconds`: that the last step took; None if there was nothing to do.
    - `knobs`: of the requests that start in this step, or start again after a preemption.
    - `everyone`: all running sequences go on, those that are scheduled and the others; otherwise
      only those that are scheduled.
    - `dropped`: requests that wait for input; the worker forgets their sequences.
    """

    offer: BlockOffer = field(default_factory=BlockOffer)
    costs: StepCosts | None = None
    seconds: float | None = None
    knobs: Mapping[str, RequestKnobs] = field(default_factory=dict)
    everyone: bool = False
    dropped: Sequence[str] = ()

    def send_with(self, scheduler_output: Any) -> None:
        """Attaches it to vLLM's output of a step."""
        setattr(scheduler_output, ATTRIBUTE, self)

    @classmethod
    def received(cls, scheduler_output: Any) -> "LoopSchedule | None":
        """What `send_with` attached; None for an output that vLLM made by itself (warm-up)."""
        schedule: LoopSchedule | None = getattr(scheduler_output, ATTRIBUTE, None)
        return schedule


@dataclass
class NewSequence:
    """A sequence that is scheduled for the first time, or again after a preemption.

    - `tokens`: all known tokens, of which the last `num_generated` are generated ones.
    - `block_ids`: by depth. Those of depths from 2 on, and those of the first `cached` positions at
      depth 1, come from the prefix cache.
    - `max_tokens`: the most tokens that it may generate in all, None for no limit.
    - `greedy`: its tokens are the most likely ones, whatever came before. It may get several in one
      step.
    - `scores_prompt`: the log-probabilities of its prompt are wanted.
    """

    request_id: str
    tokens: list[int]
    block_ids: BlockIds
    cached: int
    knobs: RequestKnobs
    num_generated: int = 0
    max_tokens: int | None = None
    greedy: bool = False
    scores_prompt: bool = False


@dataclass
class StepInput:
    """What a step has to do, independent of the model runner.

    - `scheduled`: how many new positions each request may begin. `everyone`: see `LoopSchedule`.
    - `finished`: requests that ended, were aborted or were preempted.
    - `grown`: new blocks of depth 1. `to_zero`: blocks to be filled with zeros before use.
    """

    scheduled: dict[str, int]
    everyone: bool = False
    offer: BlockOffer = field(default_factory=BlockOffer)
    costs: StepCosts | None = None
    seconds: float | None = None
    finished: list[str] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    grown: dict[str, Sequence[int]] = field(default_factory=dict)
    to_zero: list[int] = field(default_factory=list)
