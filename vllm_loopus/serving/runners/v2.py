"""The V2 model runner: vLLM's default wherever Triton works.

Its hook for models, `ModelState` (`model.get_model_state_cls`), carries the forward: attention
metadata and inputs of our own (`model_state.py`). It does not carry sequences that get no token.
What it lacks, and what is overridden here instead:

- It never sees the scheduler output: blocks offered for deeper planes, blocks of requests that go
  on, preemptions (`execute_model`).
- Every scheduled request goes through LM head and sampler; nothing chooses some of them
  (`execute_model` again, which gives the runner the leaving requests alone).
- The runner's output has no room for what the scheduler has to know (`sample_tokens`).
- Prompt scores are computed from the rows of one step (`prompt_logprobs_worker`).

Its scheduler sends a request that comes back after a preemption as a new one, with all its tokens;
the runner itself has dropped it when it was preempted.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from vllm_loopus.serving.blocks import OFFER
from vllm_loopus.serving.runner_interface import NewSequence, StepInput
from vllm_loopus.serving.runners.adapter import LoopAdapter, wants_prompt

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class V2Adapter(LoopAdapter):
    """Mixed in before vLLM's `gpu.model_runner.GPUModelRunner` or its subclass for CPUs."""

    model_state: Any  # LoopUSModelState

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.prompt_logprobs_worker is not None:
            self.prompt_logprobs_worker.__class__ = WholePromptLogprobs

    @torch.inference_mode()
    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        if not hasattr(scheduler_output, OFFER):
            # vLLM's own, for profiling and warming up: the fixed loop of the model's `forward`.
            return super(LoopAdapter, self).execute_model(scheduler_output, *args, **kwargs)
        return super().execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        if self._decoded is None:
            return super(LoopAdapter, self).sample_tokens(grammar_output)
        return super().sample_tokens(_of(grammar_output, self._decoded.request_ids))

    def _sampled(self, output: Any) -> ModelRunnerOutput:
        # Waits for the tokens, as the executor would: scheduling is not asynchronous here.
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        result: ModelRunnerOutput = output
        return result

    def zero_blocks(self, block_ids: list[int]) -> None:
        assert self.kv_block_zeroer is not None
        self.kv_block_zeroer.zero_block_ids(block_ids)

    def describe(self, scheduler_output: "SchedulerOutput") -> StepInput:
        step = super().describe(scheduler_output)
        for request_id in step.left:
            self._unseen.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            assert new.prefill_token_ids is not None and new.prompt_token_ids is not None
            generated = len(new.prefill_token_ids) - len(new.prompt_token_ids)
            self._unseen[new.req_id] = new
            step.new.append(
                NewSequence(
                    new.req_id,
                    list(new.prefill_token_ids),  # the live list, in the process of the engine
                    new.block_ids,
                    new.num_computed_tokens,
                    self._knobs_of(new),
                    num_generated=generated,
                    wants_prompt=not generated and wants_prompt(new),
                )
            )
        return step

    @property
    def _decoded(self) -> Any:
        """What the model state gives vLLM's forward as its result."""
        return self._given

    @_decoded.setter
    def _decoded(self, decoded: Any) -> None:
        self._given = decoded
        if (state := getattr(self, "model_state", None)) is not None:
            state.decoded = decoded
        if (worker := getattr(self, "prompt_logprobs_worker", None)) is not None:
            worker.prompts = decoded.prompts if decoded is not None else {}


class WholePromptLogprobs(PromptLogprobsWorker):
    """Scores a prompt at once, all positions at the exit depth of the last one, when that is known.

    vLLM's own functions are called as for a prompt that one step has gone through.
    """

    prompts: dict[str, torch.Tensor]  # hidden states [P, H] of this step's

    def compute_prompt_logprobs(
        self,
        logits_fn: Any,
        hidden_states: torch.Tensor,
        input_batch: Any,
        all_token_ids: torch.Tensor,
        num_computed_tokens: torch.Tensor,
        prompt_lens: Any,
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        none_yet = torch.zeros_like(num_computed_tokens) if self.prompts else num_computed_tokens
        for whole, hidden in self._whole_prompts(input_batch):
            result |= super().compute_prompt_logprobs(
                logits_fn, hidden, whole, all_token_ids, none_yet, prompt_lens
            )
        return result

    def compute_prompt_token_id_logprobs(
        self, logits_fn: Any, hidden_states: torch.Tensor, input_batch: Any, prompt_lens: Any
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for whole, hidden in self._whole_prompts(input_batch):
            result |= super().compute_prompt_token_id_logprobs(
                logits_fn, hidden, whole, prompt_lens
            )
        return result

    def _whole_prompts(self, input_batch: Any) -> list[tuple[Any, torch.Tensor]]:
        """A batch of one request whose prompt was computed from its first position, and its hidden
        states, for each of the step's."""
        found = []
        for index, request_id in enumerate(input_batch.req_ids):
            if (hidden := self.prompts.get(request_id)) is None:
                continue
            length = len(hidden)
            one = slice(index, index + 1)
            batch = SimpleNamespace(
                req_ids=[request_id],
                num_tokens=length,
                idx_mapping=input_batch.idx_mapping[one],
                idx_mapping_np=input_batch.idx_mapping_np[one],
                prefill_len_np=input_batch.prefill_len_np[one],
                num_computed_prefill_tokens_np=np.zeros(1, dtype=np.int32),
                num_scheduled_tokens=np.array([length], dtype=np.int32),
                query_start_loc_np=np.array([0, length], dtype=np.int32),
                query_start_loc=torch.tensor([0, length], dtype=torch.int32, device=hidden.device),
            )
            found.append((batch, hidden))
        return found


def _of(grammar_output: Any, leaving: list[str]) -> Any:
    """The grammar's rows of the leaving requests: the V2 runner expects no other."""
    if grammar_output is None:
        return None
    rows = [
        index
        for index, request_id in enumerate(grammar_output.structured_output_request_ids)
        if request_id in leaving
    ]
    if not rows:
        return None
    kept = {
        "structured_output_request_ids": [
            grammar_output.structured_output_request_ids[row] for row in rows
        ],
        "grammar_bitmask": grammar_output.grammar_bitmask[rows],
    }
    # Not in every release of the range.
    if (drafts := getattr(grammar_output, "num_acceptable_drafts", None)) is not None:
        kept["num_acceptable_drafts"] = [drafts[row] for row in rows]
    return replace(grammar_output, **kept)
