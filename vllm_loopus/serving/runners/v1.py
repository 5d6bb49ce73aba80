"""The V1 model runner: vLLM's on CPUs, and ours elsewhere unless `VLLM_USE_V2_MODEL_RUNNER=1`.

For a request that resumes after a preemption, the scheduler only sends the blocks; the runner has
stored the tokens.
"""

from dataclasses import replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP
from vllm.v1.worker.block_table import MultiGroupBlockTable

from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.messages.blocks import BlockIds
from vllm_loopus.serving.messages.step_input import LoopSchedule, NewSequence, StepInput
from vllm_loopus.serving.runners.adapter import LoopAdapter, max_tokens, scores_prompt
from vllm_loopus.serving.runners.greedy import is_greedy
from vllm_loopus.serving.runners.v1_prompt_scores import V1PromptScores
from vllm_loopus.serving.worker.transfer import HostCopy

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class NoSlotMappings(MultiGroupBlockTable):
    """The block tables of vLLM's runner, without slot mappings, which the loop computes itself.
    vLLM's would take 0.6 ms per step on a CPU for all planes, and are not used."""

    def compute_slot_mapping(self, *args: Any, **kwargs: Any) -> None:
        pass


class V1Adapter(LoopAdapter):
    """Mixed in before vLLM's `gpu_model_runner.GPUModelRunner` or `CPUModelRunner`.

    With overlap, vLLM's runner is given all requests that want a token in the step, before it is
    known which of them exit. So its own preparations come while the device still runs a pass, and
    its batch hardly changes between steps. The loop runs where vLLM would run the model. Those that
    have not exited get a row of zeros, and no token.
    """

    num_prompt_logprobs: dict[str, int]

    def _init_loop(self) -> None:
        super()._init_loop()
        self._resumed: set[str] = set()  # since vLLM's runner saw them last
        self._step: StepInput | None = None  # that the model's forward is to run
        self._tokens: HostCopy | None = None  # on their way
        self._shown: list[str] = []  # the requests in vLLM's batch
        self._same_batch = False
        self._inputs_of: dict[int, Any] = {}  # by number of requests
        self._own_processors = bool(self.vllm_config.model_config.logits_processors) or bool(
            entry_points(group=LOGITSPROCS_GROUP)
        )
        self.prompt_scores = V1PromptScores(self, self._score_part)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        # Graphs are the loop's: vLLM's forward of the exited rows computes nothing.
        self.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.NONE)
        self.input_batch.block_table.__class__ = NoSlotMappings

    @torch.inference_mode()
    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        if not self._overlaps:
            return super().execute_model(scheduler_output, *args, **kwargs)
        step = self._begin(scheduler_output)
        wanting = self._sequences.names(self._sequences.wanting())
        self._same_batch = (
            wanting == self._shown
            and not scheduler_output.finished_req_ids
            and not any(name in self._unseen or name in self._resumed for name in wanting)
        )
        if self._same_batch:
            rows = replace(
                scheduler_output,
                scheduled_new_reqs=[],
                scheduled_cached_reqs=CachedRequestData.make_empty(),
                num_scheduled_tokens=dict.fromkeys(wanting, 1),
                total_num_scheduled_tokens=len(wanting),
                new_block_ids_to_zero=None,
            )
        else:
            rows = self.rows_to_sample(wanting, scheduler_output)
        self._shown = wanting
        if wanting:
            self._step = step
            return super(LoopAdapter, self).execute_model(rows, *args, **kwargs)
        self._sequences.step(step)
        super(LoopAdapter, self).execute_model(rows, *args, **kwargs)
        return self._without_tokens()

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        """As in vLLM; if its batch stays as it is, only what logits processors need."""
        if self._step is None or not self._same_batch:
            return super()._update_states(scheduler_output)
        self.input_batch.refresh_metadata()
        return None

    def _prepare_inputs(self, scheduler_output: "SchedulerOutput", counts: Any) -> Any:
        """As in vLLM. With one position for each request and nothing that reads the inputs, the
        result depends on the number of requests alone."""
        if self._step is None or self.lora_config:
            return super()._prepare_inputs(scheduler_output, counts)
        if len(counts) not in self._inputs_of:
            self._inputs_of[len(counts)] = super()._prepare_inputs(scheduler_output, counts)
        return self._inputs_of[len(counts)]

    def _get_slot_mappings(self, *args: Any, **kwargs: Any) -> Any:
        """The loop computes its own."""
        if self._step is None:
            return super()._get_slot_mappings(*args, **kwargs)
        return None, None

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
                    max_tokens=max_tokens(new),
                    greedy=self._greedy(new.sampling_params),
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
            tokens, generated, most = list(new.prompt_token_ids or ()), 0, max_tokens(new)
            params = new.sampling_params
        else:
            state = self.requests[request_id]
            tokens = [*(state.prompt_token_ids or ()), *state.output_token_ids]
            generated = len(state.output_token_ids)
            params, most = state.sampling_params, state.sampling_params.max_tokens
            self._resumed.add(request_id)
        return NewSequence(
            request_id,
            tokens,
            blocks,
            computed,
            knobs,
            num_generated=generated,
            max_tokens=most,
            greedy=self._greedy(params),
            scores_prompt=new is not None and self._begin_scores(new),
        )

    def _greedy(self, params: Any) -> bool:
        """Whether several tokens of a request may be taken in one step."""
        return not self._own_processors and is_greedy(params)

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
        if self._decoded is None and self._step is None:
            return super()._build_attention_metadata(*args, **kwargs)
        return {}, None

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states [T, H] of the exited rows, in the order of vLLM's batch."""
        step, self._step = self._step, None
        if step is not None:
            # A seed must draw only for tokens: then the exits have to be known before sampling.
            foresees = not self.input_batch.generators
            self._decoded = self._sequences.step(step, waits=False, foresees=foresees)
            if self._decoded.hidden is None:
                config = self.vllm_config.model_config
                size = len(self.input_batch.req_ids), config.get_hidden_size()
                return torch.zeros(size, dtype=config.dtype, device=self.device)
        if self._decoded is None:
            return super()._model_forward(*args, **kwargs)
        return self._decoded.in_order(self.input_batch.req_ids)

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        """As in vLLM; with overlap, then launches the next pass."""
        if self._decoded is None or not self._overlaps:
            return super()._sample(logits, spec_decode_metadata)
        metadata = self.input_batch.sampling_metadata
        every = metadata.generators
        exited = set(self._decoded.rows_in(self.input_batch.req_ids).tolist()) if every else set()
        # Seeds go on with tokens: a row that has none must not draw from its generator.
        metadata.generators = {row: one for row, one in every.items() if row in exited}
        try:
            output = super()._sample(logits, spec_decode_metadata)
        finally:
            metadata.generators = every
        if output.logprobs_tensors is not None:  # vLLM reads them after the next pass is launched
            output.logprobs_tensors = output.logprobs_tensors.to_cpu_nonblocking()
        self._tokens = HostCopy(output.sampled_token_ids)
        sampled = output.sampled_token_ids[:, 0]
        self._sequences.go_on(self._decoded.of(sampled, self.input_batch.req_ids))
        return output

    def _to_list(self, sampled_token_ids: torch.Tensor) -> list[list[int]]:
        """The tokens of those that have exited and have not failed; none for the others."""
        if (copy := self._tokens) is None:
            every: list[list[int]] = super()._to_list(sampled_token_ids)
            if self._decoded is not None:
                self._progress = self._sequences.finish()
                self._sequences.further(self.input_batch.req_ids, every)
            return every
        self._tokens = None
        self._progress = self._sequences.finish()
        emitted = self._progress.exit_depths
        with self._sequences.runner.clock.waiting(more=True):
            tokens = copy.wait().tolist()
        names = self.input_batch.req_ids
        every = [
            token if name in emitted else [] for name, token in zip(names, tokens, strict=True)
        ]
        self._sequences.further(names, every)
        return every

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        """The scores of prompts that have their first token now."""
        scores: dict[str, Any] = self.prompt_scores.take(num_scheduled_tokens)
        for request_id in scores:
            self.num_prompt_logprobs.pop(request_id, None)
        return scores
