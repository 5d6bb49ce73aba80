"""What the adapters of both runners share.

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

from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.serving.batch import LoopedBatch, LoopProgress
from vllm_loopus.serving.blocks import OFFER, BlockOffer
from vllm_loopus.serving.boundary import boundary_rule
from vllm_loopus.serving.costs import COSTS
from vllm_loopus.serving.knobs import EngineOptions, RequestKnobs
from vllm_loopus.serving.pages import PageTables
from vllm_loopus.serving.passes import Decoded, PagedExecutor
from vllm_loopus.serving.runner_interface import LoopRunner, StepInput
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


class LoopAdapter(Runner):
    """Mixed in before a runner of vLLM; `v1.py` and `v2.py` add what differs between them."""

    _batch: LoopedBatch  # from initialize_kv_cache on

    def _init_loop(self) -> None:
        self._unseen: dict[str, NewRequestData] = {}  # by vLLM's runner
        self._decoded: Decoded | None = None
        self._progress = LoopProgress()

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._batch = build_batch(self)
        if is_global_first_rank():
            layout = self.get_model().planes.layout
            summary = start_up_summary(self.vllm_config, layout, kv_cache_config)
            logger.info("LoopUS model:\n%s", summary)

    def profile_cudagraph_memory(self) -> int:
        """vLLM would capture its own forward, which is not what runs here."""
        return 0

    def capture_model(self, **_kwargs: Any) -> int:
        """Captures the graphs of the loop instead of one of vLLM's own forward."""
        return self._batch.capture()

    @torch.inference_mode()
    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        """As in vLLM: None when `sample_tokens` is to follow, else the step's output."""
        step = self.describe(scheduler_output)
        if step.blank:
            self.zero_blocks(step.blank)
        self._batch.receive(step)
        self._decoded, self._progress = self._batch.step(step.scheduled, step.offer, step.costs)
        leaving = self._decoded.request_ids
        seen = self.rows_to_sample(leaving, scheduler_output)
        result = super().execute_model(seen, *args, **kwargs)
        if leaving:
            return result
        self._decoded = None
        return LoopUSRunnerOutput(req_ids=[], req_id_to_index={}, loop=self._progress)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        output = self._sampled(super().sample_tokens(grammar_output))
        for request_id, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True):
            for token in tokens:
                self._batch.sampled(request_id, token)
        self._decoded = None
        return LoopUSRunnerOutput(**vars(output), loop=self._progress)

    def _sampled(self, output: Any) -> ModelRunnerOutput:
        """The runner's output once the tokens are on the host."""
        result: ModelRunnerOutput = output
        return result

    def describe(self, scheduler_output: "SchedulerOutput") -> StepInput:
        """See `LoopRunner`. What both schedulers' outputs say in the same way; new requests and
        those that come back are the adapters'."""
        cached = scheduler_output.scheduled_cached_reqs
        return StepInput(
            scheduled=scheduler_output.num_scheduled_tokens,
            offer=getattr(scheduler_output, OFFER, BlockOffer()),
            costs=getattr(scheduler_output, COSTS, None),
            left=sorted(
                scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
            ),
            grown={
                request_id: blocks[0]
                for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True)
                if blocks is not None and request_id not in cached.resumed_req_ids
            },
            blank=scheduler_output.new_block_ids_to_zero or [],
        )

    def _knobs_of(self, new: NewRequestData) -> RequestKnobs:
        assert new.sampling_params is not None
        config = self.vllm_config.model_config.hf_config
        return RequestKnobs.of(new.sampling_params.extra_args, config)

    def rows_to_sample(
        self, leaving: list[str], scheduler_output: "SchedulerOutput"
    ) -> "SchedulerOutput":
        """See `LoopRunner`."""
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
            cached.num_output_tokens.append(self._batch.num_output_tokens(request_id))
            resumed = self._comes_back(request_id)
            cached.new_block_ids.append(no_blocks if resumed else None)
            if resumed:
                cached.resumed_req_ids.add(request_id)
        return replace(
            scheduler_output,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict.fromkeys(leaving, 1),
            total_num_scheduled_tokens=len(leaving),
            new_block_ids_to_zero=None,
        )

    def _comes_back(self, request_id: str) -> bool:
        """Whether vLLM's runner saw the request before a preemption, for the last time; once."""
        return False


def build_batch(runner: LoopRunner) -> LoopedBatch:
    """The loop over a runner whose K/V memory is bound."""
    vllm_config, model = runner.vllm_config, runner.get_model()
    config = vllm_config.model_config.hf_config
    groups = runner.kv_cache_config.kv_cache_groups
    block_size = groups[0].kv_cache_spec.block_size
    tables = PageTables(
        num_depths=len(groups),
        max_blocks=cdiv(vllm_config.model_config.max_model_len, block_size),
        num_blocks=runner.kv_cache_config.num_blocks,
        block_size=block_size,
    )
    options = EngineOptions.of(vllm_config.additional_config)
    if options.takes_over:
        model.planes.write_through()
    return LoopedBatch(
        PagedExecutor(model, vllm_config, tables, runner.attn_groups[0][0], runner.device),
        tables,
        boundary_rule(options.exit_quorum, config.max_loops),
        HaltingRule.from_config(config),
        max_depth=config.max_loops,
        row_budget=vllm_config.scheduler_config.max_num_batched_tokens,
        options=options,
    )


def adopt(runner: Any, adapter: type[LoopAdapter]) -> Any:
    """Makes a runner of vLLM, just built, one that runs the loop.

    vLLM's workers build their runner inside `init_device`; changing the class of what they built
    spares a copy of that function.
    """
    kind = type(runner)
    runner.__class__ = type(f"LoopUS{kind.__name__}", (adapter, kind), {})
    runner._init_loop()
    return runner


def wants_prompt(new: NewRequestData) -> bool:
    """Whether a request asks for scores of its prompt."""
    params = new.sampling_params
    return params is not None and (
        params.prompt_logprobs is not None
        or getattr(params, "prompt_logprob_token_ids", None) is not None
    )
