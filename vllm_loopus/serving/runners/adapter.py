"""What the adapters of both runners share.

The runner of vLLM sees a request only when it may get a token. First `RunningSequences` runs
encoder, passes and decoder for all running requests. Then vLLM's `execute_model` is given a
scheduler output with only the requests that have exited, each with one position, and our hidden
states as the model's output. So LM head, logits processors and sampler do no work for the others,
and seeds, penalties and log-probabilities are vLLM's own.

With overlap, the next pass is launched as soon as the tokens are sampled, before the host has read
them: `RunningSequences.go_on`.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import is_global_first_rank
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData
from vllm.v1.outputs import ModelRunnerOutput

from vllm_loopus.architectures import record_of
from vllm_loopus.serving.knobs.engine import AUTO, EngineOptions
from vllm_loopus.serving.messages.progress import LoopProgress
from vllm_loopus.serving.messages.step_input import LoopSchedule, StepInput
from vllm_loopus.serving.runners.interface import LoopRunner
from vllm_loopus.serving.runners.start_up import start_up_summary
from vllm_loopus.serving.step.quorum import quorum_for
from vllm_loopus.serving.step.run import StepRunner
from vllm_loopus.serving.step.staircase import Staircases
from vllm_loopus.serving.step.wave import Waves
from vllm_loopus.serving.step.wave_plan import AutoPlan, WavePlan
from vllm_loopus.serving.worker.block_tables import BlockTables
from vllm_loopus.serving.worker.decoded import Decoded
from vllm_loopus.serving.worker.executor import PagedExecutor
from vllm_loopus.serving.worker.sequences import RunningSequences

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

    prompt_scores: Any  # V1PromptScores or V2PromptScores
    _sequences: RunningSequences  # from initialize_kv_cache on

    def _init_loop(self) -> None:
        self._unseen: dict[str, NewRequestData] = {}  # by vLLM's runner
        self._decoded: Decoded | None = None
        self._progress: LoopProgress | None = None  # of a step whose tokens are being read

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._sequences = build_sequences(self)
        self.get_model().is_served = True
        if is_global_first_rank():
            layout = self.get_model().planes.layout
            logger.info(start_up_summary(self.vllm_config, layout, kv_cache_config))

    def profile_cudagraph_memory(self) -> int:
        """vLLM would capture its own forward, which does not run here."""
        return 0

    def capture_model(self, **_kwargs: Any) -> int:
        """Captures the graphs of the loop instead of one of vLLM's own forward."""
        return self._sequences.capture()

    @torch.inference_mode()
    def execute_model(self, scheduler_output: "SchedulerOutput", *args: Any, **kwargs: Any) -> Any:
        """As in vLLM: None if `sample_tokens` is to follow, else the step's output."""
        step = self._begin(scheduler_output)
        self._decoded = self._sequences.step(step)
        exited = self._decoded.request_ids
        result = super().execute_model(
            self.rows_to_sample(exited, scheduler_output), *args, **kwargs
        )
        return result if exited else self._without_tokens()

    def _begin(self, scheduler_output: "SchedulerOutput") -> StepInput:
        """Begins a step."""
        step = self.describe(scheduler_output)
        if step.to_zero:
            self.zero_blocks(step.to_zero)
        self._sequences.receive(step)
        self._sequences.begin_step(step)
        return step

    def _without_tokens(self) -> "LoopUSRunnerOutput":
        """The output of a step after which nothing is sampled."""
        self._decoded = None
        return LoopUSRunnerOutput(req_ids=[], req_id_to_index={}, loop=self._sequences.finish())

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        output = self._sampled(super().sample_tokens(grammar_output))
        if self._progress is None:
            self._progress = self._sequences.finish()
        for request_id, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True):
            for token in tokens:
                self._sequences.sampled(request_id, token)
        progress, self._progress, self._decoded = self._progress, None, None
        return LoopUSRunnerOutput(**vars(output), loop=progress)

    def _sampled(self, output: Any) -> ModelRunnerOutput:
        """The runner's output once the tokens are on the host."""
        result: ModelRunnerOutput = output
        return result

    @property
    def _overlaps(self) -> bool:
        """Whether the next pass is launched before the tokens are read."""
        return self._sequences.runner.overlap

    def describe(self, scheduler_output: "SchedulerOutput") -> StepInput:
        """See `LoopRunner`. The part that is the same for both runners; the adapters add new and
        resumed requests."""
        cached = scheduler_output.scheduled_cached_reqs
        schedule = LoopSchedule.received(scheduler_output) or LoopSchedule()
        finished = sorted(
            scheduler_output.finished_req_ids
            | (scheduler_output.preempted_req_ids or set())
            | set(schedule.dropped)
        )
        for request_id in finished:
            self.prompt_scores.forget(request_id)
        return StepInput(
            scheduled=scheduler_output.num_scheduled_tokens,
            everyone=schedule.everyone,
            offer=schedule.offer,
            costs=schedule.costs,
            seconds=schedule.seconds,
            finished=finished,
            grown={
                request_id: blocks[0]
                for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True)
                if blocks is not None and request_id not in cached.resumed_req_ids
            },
            to_zero=scheduler_output.new_block_ids_to_zero or [],
        )

    def rows_to_sample(
        self, exited: list[str], scheduler_output: "SchedulerOutput"
    ) -> "SchedulerOutput":
        """See `LoopRunner`."""
        new: list[NewRequestData] = []
        cached = CachedRequestData([], set(), [], {}, [], [], [])
        no_blocks: tuple[list[int], ...] = tuple([] for _ in self.kv_cache_config.kv_cache_groups)
        positions, generated = self._sequences.positions(exited)
        for request_id, position, outputs in zip(exited, positions, generated, strict=True):
            if (unseen := self._unseen.pop(request_id, None)) is not None:
                new.append(replace(unseen, block_ids=no_blocks, num_computed_tokens=position))
                continue
            cached.req_ids.append(request_id)
            cached.num_computed_tokens.append(position)
            cached.num_output_tokens.append(outputs)
            resumed = self._comes_back(request_id)
            cached.new_block_ids.append(no_blocks if resumed else None)
            if resumed:
                cached.resumed_req_ids.add(request_id)
        return replace(
            scheduler_output,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=dict.fromkeys(exited, 1),
            total_num_scheduled_tokens=len(exited),
            new_block_ids_to_zero=None,
        )

    def _comes_back(self, request_id: str) -> bool:
        """Whether vLLM's runner last saw the request before a preemption; true only once."""
        return False


def build_sequences(runner: LoopRunner) -> RunningSequences:
    """The loop over a runner whose K/V memory is bound."""
    vllm_config, model = runner.vllm_config, runner.get_model()
    config = vllm_config.model_config.hf_config
    rule = record_of(config).exit_rule.from_config(config)
    groups = runner.kv_cache_config.kv_cache_groups
    block_size = groups[0].kv_cache_spec.block_size
    tables = BlockTables(
        num_depths=len(groups),
        max_blocks=cdiv(vllm_config.model_config.max_model_len, block_size),
        num_blocks=runner.kv_cache_config.num_blocks,
        block_size=block_size,
    )
    options = EngineOptions.of(vllm_config.additional_config)
    if options.last_exited:
        model.planes.allow_extra_slots()
    slots = options.positions_in_flight
    stairs = Staircases(
        config.max_loops,
        options.last_exited,
        options.full_prefill,
        slots,
        decoder_attends=bool(model.planes.decoder_names),
        planes=len(groups),
        decodes_in_passes=model.planes.decodes_in_passes,
    )
    row_budget = vllm_config.scheduler_config.max_num_batched_tokens
    executor = PagedExecutor(
        model,
        vllm_config,
        stairs,
        tables,
        runner.attn_groups[0][0],
        runner.device,
        rule,
        runner.prompt_scores,
    )
    return RunningSequences(
        executor,
        stairs,
        tables,
        StepRunner(
            stairs,
            executor,
            quorum_for(options.exit_quorum, config.max_loops),
            row_budget,
            asynchronous=executor.asynchronous,
            overlap=options.overlaps(executor.asynchronous),
            late=options.reads_late,
            waves=waves_of(options, stairs),
        ),
        rule,
        row_budget,
        vllm_config.model_config.max_model_len,
        options,
    )


def waves_of(options: EngineOptions, stairs: Staircases) -> Waves | None:
    """Guessed positions, as the options say; None without."""
    if not options.speculates:
        return None
    if options.speculate == AUTO:
        return Waves(stairs, AutoPlan(stairs.num_depths, options.lookahead))
    return Waves(stairs, WavePlan(options.draft_depth, options.lookahead))


def adopt(runner: Any, adapter: type[LoopAdapter]) -> Any:
    """Makes a runner that vLLM has just built one that runs the loop.

    vLLM's workers build their runner inside `init_device`; changing the class of what they built
    avoids a copy of that function.
    """
    kind = type(runner)
    runner.__class__ = type(f"LoopUS{kind.__name__}", (adapter, kind), {})
    runner._init_loop()
    return runner


def max_tokens(new: NewRequestData) -> int | None:
    """The most tokens that a request generates."""
    return None if new.sampling_params is None else new.sampling_params.max_tokens


def scores_prompt(new: NewRequestData) -> bool:
    """Whether a request asks for scores of its prompt."""
    params = new.sampling_params
    return params is not None and (
        params.prompt_logprobs is not None
        or getattr(params, "prompt_logprob_token_ids", None) is not None
    )
