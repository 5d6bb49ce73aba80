"""The interface between the loop and a model runner.

The loop (`worker/`) does not depend on a runner: in each step it gets a `StepInput`, a plain
description of the scheduler's output, and returns `Decoded` rows and a `LoopProgress`. Only the
adapters depend on vLLM's runners; `tests/serving/test_runners.py` checks that both describe the
same steps alike.

Block tables and slot mappings are the loop's own (`worker/block_tables.py`), because a step takes
blocks that the scheduler has not assigned yet; so are the forward contexts of its passes
(`worker/attention.py`). A runner gives the metadata builders of its K/V groups, and takes over at
the LM head.
"""

from typing import Any, Protocol

import torch

from vllm_loopus.serving.messages.step_input import StepInput
from vllm_loopus.serving.model.seam import LoopedModel
from vllm_loopus.serving.worker.executor import PromptScorer


class LoopRunner(Protocol):
    """A model runner, as far as the loop is concerned.

    `kv_cache_config.kv_cache_groups[d]` and `attn_groups[d]` are the plane of depth d + 1. All
    planes look alike, so the metadata builder of `attn_groups[0][0]` serves them all.
    """

    vllm_config: Any
    kv_cache_config: Any
    attn_groups: list[list[Any]]
    device: torch.device
    prompt_scores: PromptScorer

    def get_model(self) -> LoopedModel:
        """Our vLLM model, with its K/V memory bound."""
        ...

    def describe(self, scheduler_output: Any) -> StepInput:
        """The `StepInput` for a scheduler output in the form that this runner gets."""
        ...

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Fills blocks of all layers with zeros."""
        ...

    def rows_to_sample(self, exited: list[str], scheduler_output: Any) -> Any:
        """What vLLM's own runner gets to see of a step: the `exited` requests, one position each,
        without blocks, because nothing attends inside it. It computes their logits and samples."""
        ...
