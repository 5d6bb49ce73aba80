"""The V2 model runner: vLLM's default wherever Triton works.

Its hook for models, `ModelState` (`model.get_model_state_cls`), carries the forward: attention
metadata and inputs of our own (`model/model_state.py`). It does not carry sequences that get no
token. What it lacks is overridden here instead:

- It never sees the scheduler output: blocks offered for deeper planes, blocks of requests that go
  on, preemptions (`execute_model`).
- Every scheduled request goes through LM head and sampler; there is no way to select some of them
  (`execute_model` again, which gives the runner only the requests that have exited).
- The runner's output has no room for what the scheduler has to know (`sample_tokens`).
- Prompt scores are computed from the rows of one step (`prompt_logprobs_worker`).

Its scheduler sends a request that resumes after a preemption as a new one, with all its tokens.
The runner itself drops a request that is preempted.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_loopus.serving.messages.step_input import LoopSchedule, NewSequence, StepInput
from vllm_loopus.serving.runners.adapter import LoopAdapter, max_tokens, scores_prompt
from vllm_loopus.serving.runners.v2_prompt_scores import V2PromptScores

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class V2Adapter(LoopAdapter):
    """Mixed in before vLLM's `gpu.model_runner.GPUModelRunner` or its subclass for CPUs."""

    model_state: Any  # LoopedModelState
    prompt_logprobs_worker: Any

    def _init_loop(self) -> None:
        super()._init_loop()
        self.prompt_scores = V2PromptScores(self)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        if self.prompt_logprobs_worker is not None:
            self.prompt_logprobs_worker = self.prompt_scores

    @torch.inference_mode()
    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        if LoopSchedule.received(scheduler_output) is None:
            # vLLM's own, for profiling and warm-up: the fixed loop of the model's `forward`.
            return super(LoopAdapter, self).execute_model(scheduler_output, *args, **kwargs)
        return super().execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        if self._decoded is None:
            return super(LoopAdapter, self).sample_tokens(grammar_output)
        return super().sample_tokens(_of(grammar_output, self._decoded.request_ids))

    def _sampled(self, output: Any) -> ModelRunnerOutput:
        # Waits for the tokens, as the executor would: scheduling is not asynchronous here. Their
        # copy was queued before the next pass.
        if isinstance(output, AsyncModelRunnerOutput):
            if self._overlaps:
                sampled = output.sampler_output.sampled_token_ids[:, 0]
                names = output.model_runner_output.req_ids
                self._sequences.go_on(self._decoded.of(sampled, names))
            output = output.get_output()
        result: ModelRunnerOutput = output
        return result

    def zero_blocks(self, block_ids: list[int]) -> None:
        assert self.kv_block_zeroer is not None
        self.kv_block_zeroer.zero_block_ids(block_ids)

    def describe(self, scheduler_output: "SchedulerOutput") -> StepInput:
        step = super().describe(scheduler_output)
        for request_id in step.finished:
            self._unseen.pop(request_id, None)
        schedule = LoopSchedule.received(scheduler_output)
        knobs = {} if schedule is None else schedule.knobs
        for new in scheduler_output.scheduled_new_reqs:
            assert new.prefill_token_ids is not None and new.prompt_token_ids is not None
            generated = len(new.prefill_token_ids) - len(new.prompt_token_ids)
            scored = not generated and scores_prompt(new)
            if scored:
                tokens = list(new.prompt_token_ids)
                self.prompt_scores.begin(new.req_id, tokens, new.sampling_params)
            self._unseen[new.req_id] = new
            step.new.append(
                NewSequence(
                    new.req_id,
                    list(new.prefill_token_ids),  # the live list, in the process of the engine
                    new.block_ids,
                    new.num_computed_tokens,
                    knobs[new.req_id],
                    num_generated=generated,
                    max_tokens=max_tokens(new),
                    scores_prompt=scored,
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


def _of(grammar_output: Any, exited: list[str]) -> Any:
    """The grammar's rows of the requests that have exited: the V2 runner expects no others."""
    if grammar_output is None:
        return None
    rows = [
        index
        for index, request_id in enumerate(grammar_output.structured_output_request_ids)
        if request_id in exited
    ]
    if not rows:
        return None
    selected = {
        "structured_output_request_ids": [
            grammar_output.structured_output_request_ids[row] for row in rows
        ],
        "grammar_bitmask": grammar_output.grammar_bitmask[rows],
    }
    # Not in every release of the range.
    if (drafts := getattr(grammar_output, "num_acceptable_drafts", None)) is not None:
        selected["num_acceptable_drafts"] = [drafts[row] for row in rows]
    return replace(grammar_output, **selected)
