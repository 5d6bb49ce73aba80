"""The V1 model runner: vLLM's on CPUs, and elsewhere with `VLLM_USE_V2_MODEL_RUNNER=0`.

Its scheduler sends a request that comes back after a preemption with its blocks alone: the tokens
are those that the runner remembers.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData

from vllm_loopus.serving.knobs import RequestKnobs
from vllm_loopus.serving.runner_interface import NewSequence, StepInput
from vllm_loopus.serving.runners.adapter import LoopAdapter, wants_prompt

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class V1Adapter(LoopAdapter):
    """Mixed in before vLLM's `gpu_model_runner.GPUModelRunner` or `CPUModelRunner`."""

    num_prompt_logprobs: dict[str, int]

    def _init_loop(self) -> None:
        super()._init_loop()
        self._resumed: set[str] = set()  # since vLLM's runner saw them last
        self._knobs: dict[str, RequestKnobs] = {}

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        # Graphs are the loop's: vLLM's forward of the leaving rows computes nothing.
        self.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.NONE)
        # So are slots; vLLM's, of all planes, cost 0.6 ms a step on a CPU and nobody reads them.
        self.input_batch.block_table.compute_slot_mapping = _no_slots

    def zero_blocks(self, block_ids: list[int]) -> None:
        self._zero_block_ids(block_ids)

    def describe(self, scheduler_output: "SchedulerOutput") -> StepInput:
        step = super().describe(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            self._unseen.pop(request_id, None)
            self._resumed.discard(request_id)
            self._knobs.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            self._knobs[new.req_id] = self._knobs_of(new)
            self._unseen[new.req_id] = new
            step.new.append(
                NewSequence(
                    new.req_id,
                    list(new.prompt_token_ids),
                    new.block_ids,
                    new.num_computed_tokens,
                    self._knobs[new.req_id],
                    wants_prompt=wants_prompt(new),
                )
            )
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            if request_id in cached.resumed_req_ids:
                blocks = cached.new_block_ids[index]
                assert blocks is not None
                step.new.append(self._resume(request_id, blocks, cached.num_computed_tokens[index]))
        return step

    def _resume(self, request_id: str, blocks: tuple[list[int], ...], computed: int) -> NewSequence:
        """A preempted request comes back: all it had is to be computed again."""
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
            self._knobs[request_id],
            num_generated=generated,
            wants_prompt=new is not None and wants_prompt(new),
        )

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
        """Hidden states [T, H] of the leaving rows, in the order of vLLM's batch."""
        if self._decoded is None:
            return super()._model_forward(*args, **kwargs)
        return self._decoded.in_order(self.input_batch.req_ids)

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        """Prompt log-probabilities, all positions at the exit depth of the last one.

        vLLM's own function is called as for a prompt in chunks, once the depth is known.
        """
        if self._decoded is None or not self._decoded.prompts:
            return {}
        prompts = self._decoded.prompts
        wanted: dict[str, int] = self.num_prompt_logprobs
        start = self.query_start_loc.np.copy()
        result: dict[str, Any] = {}
        for request_id in [name for name in wanted if name in prompts]:
            hidden, state = prompts[request_id], self.requests[request_id]
            computed = state.num_computed_tokens
            self.num_prompt_logprobs = {request_id: wanted.pop(request_id)}
            self.query_start_loc.np[self.input_batch.req_id_to_index[request_id]] = 0
            for first in range(0, len(hidden), self.max_num_tokens):
                part = hidden[first : first + self.max_num_tokens]
                state.num_computed_tokens = first
                result |= super()._get_prompt_logprobs_dict(part, {request_id: len(part)})
            state.num_computed_tokens = computed
        self.num_prompt_logprobs = wanted
        self.query_start_loc.np[:] = start
        return result


def _no_slots(*_args: Any) -> None:
    """In place of `MultiGroupBlockTable.compute_slot_mapping`."""
