"""Adapter between vLLM's V1 model runner and `LoopedBatch`.

The runner of vLLM sees a request only in steps in which it gets a token: first `LoopedBatch` runs
encoder, passes and decoder for all scheduled requests; then vLLM's `execute_model` is given a
scheduler output with the leaving requests alone, each with one position, and our hidden states as
the model's output. LM head, logits processors and sampler thus do no work for those that stay, and
seeds, penalties and log-probabilities need no care of ours.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData
from vllm.v1.outputs import ModelRunnerOutput

from vllm_loopus.serving.batch import LoopedBatch, LoopProgress
from vllm_loopus.serving.blocks import OFFER, BlockOffer
from vllm_loopus.serving.boundary import boundary_rule
from vllm_loopus.serving.costs import COSTS
from vllm_loopus.serving.knobs import EngineOptions, RequestKnobs
from vllm_loopus.serving.pages import PageTables
from vllm_loopus.serving.passes import Decoded, PagedExecutor
from vllm_loopus.serving.summary import start_up_summary

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner
else:
    Runner = object


logger = init_logger("vllm.loopus")


@dataclass
class LoopUSRunnerOutput(ModelRunnerOutput):
    """A runner's output with what the scheduler has to know of the loop."""

    loop: LoopProgress = field(default_factory=LoopProgress)


class LoopUSRunner(Runner):
    """Mixed in before vLLM's V1 runner of the platform; see `adopt`."""

    num_prompt_logprobs: dict[str, int]
    _batch: LoopedBatch  # from initialize_kv_cache on

    def _init_loop(self) -> None:
        self._unseen: dict[str, NewRequestData] = {}  # by vLLM's runner
        self._resumed: set[str] = set()  # since vLLM's runner saw them last
        self._knobs: dict[str, RequestKnobs] = {}
        self._decoded: Decoded | None = None
        self._progress = LoopProgress()

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        config = self.vllm_config.model_config.hf_config
        groups = kv_cache_config.kv_cache_groups
        block_size = groups[0].kv_cache_spec.block_size
        tables = PageTables(
            num_depths=len(groups),
            max_blocks=cdiv(self.max_model_len, block_size),
            num_blocks=kv_cache_config.num_blocks,
            block_size=block_size,
        )
        options = EngineOptions.of(self.vllm_config.additional_config)
        if options.takes_over:
            self.model.planes.write_through()
        self._batch = LoopedBatch(
            PagedExecutor(
                self.model, self.vllm_config, tables, self.attn_groups[0][0], self.device
            ),
            tables,
            boundary_rule(options.exit_quorum, config.max_loops, config.exit_interval),
            max_depth=config.max_loops,
            row_budget=self.scheduler_config.max_num_batched_tokens,
            options=options,
        )
        if is_global_first_rank():
            summary = start_up_summary(self.vllm_config, self.model.planes.layout, kv_cache_config)
            logger.info("LoopUS model:\n%s", summary)

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: "SchedulerOutput", intermediate_tensors: Any = None
    ) -> Any:
        """As in vLLM: None when `sample_tokens` is to follow, else the step's output."""
        self._receive(scheduler_output)
        self._decoded, self._progress = self._batch.step(
            scheduler_output.num_scheduled_tokens,
            getattr(scheduler_output, OFFER, BlockOffer()),
            getattr(scheduler_output, COSTS, None),
        )
        leaving = self._decoded.request_ids
        result = super().execute_model(self._only(leaving, scheduler_output), intermediate_tensors)
        if leaving:
            return result
        self._decoded = None
        return LoopUSRunnerOutput(req_ids=[], req_id_to_index={}, loop=self._progress)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        for request_id, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True):
            for token in tokens:
                self._batch.sampled(request_id, token)
        self._decoded = None
        return LoopUSRunnerOutput(**vars(output), loop=self._progress)

    def _receive(self, scheduler_output: "SchedulerOutput") -> None:
        """Brings the batch up to date with the scheduler."""
        if blocks := scheduler_output.new_block_ids_to_zero:
            self._zero_block_ids(blocks)
        for request_id in scheduler_output.finished_req_ids:
            self._batch.remove(request_id)
            self._unseen.pop(request_id, None)
            self._resumed.discard(request_id)
            self._knobs.pop(request_id, None)
        for request_id in scheduler_output.preempted_req_ids or ():
            self._batch.remove(request_id)
        config = self.vllm_config.model_config.hf_config
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            assert new.prompt_token_ids is not None and params is not None
            self._knobs[new.req_id] = RequestKnobs.of(params.extra_args, config)
            self._unseen[new.req_id] = new
            self._batch.add(
                new.req_id,
                new.prompt_token_ids,
                new.block_ids,
                new.num_computed_tokens,
                self._knobs[new.req_id],
                wants_prompt=_wants_prompt(new),
            )
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                assert blocks is not None
                self._resume(request_id, blocks, cached.num_computed_tokens[index])
            elif blocks is not None:
                self._batch.grow(request_id, blocks[0])

    def _resume(self, request_id: str, blocks: tuple[list[int], ...], computed: int) -> None:
        """A preempted request comes back: all it had is to be computed again."""
        new = self._unseen.get(request_id)
        if new is not None:  # preempted before its first token
            tokens, generated = list(new.prompt_token_ids or ()), 0
        else:
            state = self.requests[request_id]
            tokens = [*(state.prompt_token_ids or ()), *state.output_token_ids]
            generated = len(state.output_token_ids)
            self._resumed.add(request_id)
        self._batch.add(
            request_id,
            tokens,
            blocks,
            computed,
            self._knobs[request_id],
            num_generated=generated,
            wants_prompt=new is not None and _wants_prompt(new),
        )

    def _only(self, leaving: list[str], scheduler_output: "SchedulerOutput") -> "SchedulerOutput":
        """What vLLM's runner is to see of a step: leaving requests, one position each, and no
        blocks, for nothing attends inside it."""
        new: list[NewRequestData] = []
        cached = CachedRequestData([], set(), [], {}, [], [], [])
        no_blocks: tuple[list[int], ...] = tuple([] for _ in self.kv_cache_config.kv_cache_groups)
        for request_id in leaving:
            position = self._batch.position(request_id)
            if (unseen := self._unseen.pop(request_id, None)) is not None:
                new.append(replace(unseen, block_ids=no_blocks, num_computed_tokens=position))
                continue
            cached.req_ids.append(request_id)
            cached.num_computed_tokens.append(position)
            cached.num_output_tokens.append(len(self.requests[request_id].output_token_ids))
            resumed = request_id in self._resumed
            cached.new_block_ids.append(no_blocks if resumed else None)
            if resumed:
                self._resumed.remove(request_id)
                cached.resumed_req_ids.add(request_id)
        return replace(
            scheduler_output,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict.fromkeys(leaving, 1),
            total_num_scheduled_tokens=len(leaving),
            new_block_ids_to_zero=None,
        )

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """The passes built their own; nothing attends inside vLLM's forward."""
        if self._decoded is None:
            return super()._build_attention_metadata(*args, **kwargs)
        return {}, None

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states [T, H] of the leaving rows, in the order of vLLM's batch."""
        decoded = self._decoded
        if decoded is None:
            return super()._model_forward(*args, **kwargs)
        assert decoded.hidden is not None
        row = {request_id: index for index, request_id in enumerate(decoded.request_ids)}
        order = [row[request_id] for request_id in self.input_batch.req_ids]
        return decoded.hidden[torch.tensor(order, device=decoded.hidden.device)]

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


def adopt(runner: Any) -> Any:
    """Makes a V1 runner of vLLM, just built, a `LoopUSRunner` of its platform.

    vLLM's workers build their runner inside `init_device`; changing the class of what they built
    spares a copy of that function.
    """
    kind = type(runner)
    runner.__class__ = type(f"LoopUS{kind.__name__}", (LoopUSRunner, kind), {})
    runner._init_loop()
    return runner


def _wants_prompt(new: NewRequestData) -> bool:
    return new.sampling_params is not None and new.sampling_params.prompt_logprobs is not None
