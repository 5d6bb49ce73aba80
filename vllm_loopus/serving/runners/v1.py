"""The V1 model runner: vLLM's on CPUs, and ours elsewhere unless `VLLM_USE_V2_MODEL_RUNNER=1`.

For a request that resumes after a preemption, the scheduler only sends the blocks; the runner has
stored the tokens.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.block_table import MultiGroupBlockTable

from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.messages.blocks import BlockIds
from vllm_loopus.serving.messages.step_input import LoopSchedule, NewSequence, StepInput
from vllm_loopus.serving.runners.adapter import LoopAdapter, scores_prompt
from vllm_loopus.serving.runners.v1_prompt_scores import V1PromptScores

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class NoSlotMappings(MultiGroupBlockTable):
    """The block tables of vLLM's runner, without slot mappings, which the loop computes itself.
    vLLM's would take 0.6 ms per step on a CPU for all planes, and are not used."""

    def compute_slot_mapping(self, *args: Any, **kwargs: Any) -> None:
        pass


class V1Adapter(LoopAdapter):
    """Mixed in before vLLM's `gpu_model_runner.GPUModelRunner` or `CPUModelRunner`."""

    num_prompt_logprobs: dict[str, int]

    def _init_loop(self) -> None:
        super()._init_loop()
        self._resumed: set[str] = set()  # since vLLM's runner saw them last
        self.prompt_scores = V1PromptScores(self, self._score_part)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        # Graphs are the loop's: vLLM's forward of the exited rows computes nothing.
        self.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.NONE)
        self.input_batch.block_table.__class__ = NoSlotMappings

    def zero_blocks(self, block_ids: list[int]) -> None:
        self._zero_block_ids(block_ids)

    def describe(self, scheduler_output: "SchedulerOutput") -> StepInput:
        step = super().describe(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            self._unseen.pop(request_id, None)
            self._resumed.discard(request_id)
        schedule = LoopSchedule.received(scheduler_output)
        knobs = {} if schedule is None else schedule.knobs
        for new in scheduler_output.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            self._unseen[new.req_id] = new
            step.new.append(
                NewSequence(
                    new.req_id,
                    list(new.prompt_token_ids),
                    new.block_ids,
                    new.num_computed_tokens,
                    knobs[new.req_id],
                    scores_prompt=self._begin_scores(new),
                )
            )
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            if request_id in cached.resumed_req_ids:
                blocks = cached.new_block_ids[index]
                assert blocks is not None
                computed = cached.num_computed_tokens[index]
                step.new.append(self._resume(request_id, blocks, computed, knobs[request_id]))
        return step

    def _resume(
        self, request_id: str, blocks: BlockIds, computed: int, knobs: RequestKnobs
    ) -> NewSequence:
        """A resumed request: everything is recomputed."""
        new: NewRequestData | None = self._unseen.get(request_id)
        if new is not None:  # preempted before its first token
            tokens, generated = list(new.prompt_token_ids or ()), 0
        else:
            state = self.requests[request_id]
            tokens = [*(state.prompt_token_ids or ()), *state.output_token_ids]
            generated = len(state.output_token_ids)
            self._resumed.add(request_id)
        return NewSequence(
            request_id,
            tokens,
            blocks,
            computed,
            knobs,
            num_generated=generated,
            scores_prompt=new is not None and self._begin_scores(new),
        )

    def _begin_scores(self, new: NewRequestData) -> bool:
        """Whether the prompt of a request is to be scored."""
        if not scores_prompt(new):
            return False
        tokens = list(new.prompt_token_ids or ())
        self.prompt_scores.begin(new.req_id, tokens, new.sampling_params)
        return True

    def _score_part(self, runner: Any, hidden: torch.Tensor, counts: dict[str, int]) -> Any:
        """vLLM's function for a chunk of a prompt, on `runner`, a stand-in for this one."""
        vllms_own: Any = super()._get_prompt_logprobs_dict
        return vllms_own.__func__(runner, hidden, counts)

    def _comes_back(self, request_id: str) -> bool:
        if request_id not in self._resumed:
            return False
        self._resumed.remove(request_id)
        return True

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """The passes built their own; nothing attends inside vLLM's forward."""
        if self._decoded is None:
            return super()._build_attention_metadata(*args, **kwargs)
        return {}, None

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states [T, H] of the exited rows, in the order of vLLM's batch."""
        if self._decoded is None:
            return super()._model_forward(*args, **kwargs)
        return self._decoded.in_order(self.input_batch.req_ids)

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        """The scores of prompts that have their first token now."""
        scores: dict[str, Any] = self.prompt_scores.take(num_scheduled_tokens)
        for request_id in scores:
            self.num_prompt_logprobs.pop(request_id, None)
        return scores
