"""What the loop and a model runner of vLLM know of each other.

The loop (`batch.py` and below) knows no runner: it gets a `StepInput` a step, a plain description
of what the scheduler wants, and gives `Decoded` rows and a `LoopProgress`. It is built from what a
`LoopRunner` has. The adapters in `runners/` are the only code that knows vLLM's runners; both give
the same description of the same steps (`tests/serving/test_runners.py`).

Block tables and slot mappings are the loop's own (`pages.py`), for a step takes blocks that the
scheduler has not assigned yet; so are the forward contexts of its passes (`attention.py`). A runner
gives the metadata builders of its K/V groups, and takes over at the LM head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from vllm_loopus.serving.blocks import BlockOffer
from vllm_loopus.serving.boundary import StepCosts
from vllm_loopus.serving.knobs import RequestKnobs
from vllm_loopus.serving.pages import BlockIds


@dataclass
class NewSequence:
    """A sequence that is scheduled for the first time, or again after a preemption.

    `tokens`: all that are known, `num_generated` of them generated. `block_ids`: by depth; those
    above depth 1, and those of the first `cached` positions at depth 1, come from the prefix cache.
    `wants_prompt`: the hidden states of the whole prompt are wanted with its first token.
    """

    request_id: str
    tokens: list[int]
    block_ids: BlockIds
    cached: int
    knobs: RequestKnobs
    num_generated: int = 0
    wants_prompt: bool = False


@dataclass
class StepInput:
    """What the scheduler says of a step.

    `scheduled`: how many new positions each request may begin. `left`: requests that finished, were
    aborted or preempted. `grown`: new blocks of depth 1. `blank`: blocks to be zeroed before use.
    """

    scheduled: dict[str, int]
    offer: BlockOffer = field(default_factory=BlockOffer)
    costs: StepCosts | None = None
    left: list[str] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)
    grown: dict[str, Sequence[int]] = field(default_factory=dict)
    blank: list[int] = field(default_factory=list)


class LoopRunner(Protocol):
    """A model runner, as far as the loop is concerned.

    `kv_cache_config.kv_cache_groups[d]` and `attn_groups[d]` are the plane of depth d + 1; all
    planes look alike, so the metadata builder of `attn_groups[0][0]` serves them all.
    """

    vllm_config: Any
    kv_cache_config: Any
    attn_groups: list[list[Any]]
    device: torch.device

    def get_model(self) -> Any:
        """Our vLLM model, its K/V memory bound."""
        ...

    def describe(self, scheduler_output: Any) -> StepInput:
        """What a scheduler output says, in the form that this runner's scheduler sends it."""
        ...

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Fills blocks of all layers with zeros."""
        ...

    def rows_to_sample(self, leaving: list[str], scheduler_output: Any) -> Any:
        """What vLLM's own runner is to see of a step: the `leaving` requests, one position each,
        and no blocks, for nothing attends inside it. It computes logits and samples for them."""
        ...
