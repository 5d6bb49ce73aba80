"""Scheduler and model-runner adapters without a model, over `fake_executor.FakeExecutor`."""

from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

from tests.conftest import GOLDEN
from tests.serving.fake_executor import BLOCK, EagerQuorum, FakeExecutor
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.serving.core.scheduler import LoopUSScheduler
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.messages.exit_depths import NAME
from vllm_loopus.serving.messages.step_input import StepInput
from vllm_loopus.serving.model.model_state import LoopedModelState
from vllm_loopus.serving.runners.adapter import waves_of
from vllm_loopus.serving.runners.v1 import V1Adapter
from vllm_loopus.serving.runners.v2 import V2Adapter
from vllm_loopus.serving.step.quorum import quorum_for
from vllm_loopus.serving.step.run import StepRunner
from vllm_loopus.serving.step.staircase import Staircases
from vllm_loopus.serving.worker.block_tables import BlockTables
from vllm_loopus.serving.worker.sequences import RunningSequences


def received(output: Any) -> list[int]:
    """What `exit_depths.send` put into an engine core's output."""
    if NAME in (values := getattr(output, "token_values", None) or {}):
        return list(values[NAME])
    depths = output.routed_experts
    return depths.tolist() if depths is not None and depths.ndim == 1 else []


class FakeV1:
    """As much of vLLM's V1 runner as its adapter relies on."""

    lora_config = None
    input_batch: Any = SimpleNamespace(req_ids=[], generators={})

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        self._update_states(scheduler_output)
        names = list(scheduler_output.num_scheduled_tokens)
        assert sorted(names) == sorted(self.input_batch.req_ids)
        if not names:
            return ModelRunnerOutput(req_ids=[], req_id_to_index={})
        self._prepare_inputs(scheduler_output, names)
        assert self._build_attention_metadata() == ({}, None)
        self.hidden = self._model_forward()
        return None

    def _update_states(self, scheduler_output: Any) -> None:
        for name in scheduler_output.finished_req_ids:
            self.requests.pop(name, None)
        for new in scheduler_output.scheduled_new_reqs:
            self.requests[new.req_id] = SimpleNamespace(
                prompt_token_ids=new.prompt_token_ids,
                output_token_ids=[],
                sampling_params=new.sampling_params,
            )
        cached = scheduler_output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            generated = len(self.requests[name].output_token_ids)
            assert cached.num_output_tokens[index] == generated
            assert (cached.new_block_ids[index] is not None) == (name in cached.resumed_req_ids)
        names = list(scheduler_output.num_scheduled_tokens)[::-1]  # an order of its own
        self.input_batch = SimpleNamespace(
            req_ids=names,
            generators={},
            sampling_metadata=SimpleNamespace(generators={}),
            refresh_metadata=lambda: None,
        )

    def _prepare_inputs(self, scheduler_output: Any, counts: Any) -> Any:
        return len(counts)

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        return SimpleNamespace(sampled_token_ids=self.hidden[:, :1].long(), logprobs_tensors=None)

    def _to_list(self, sampled_token_ids: torch.Tensor) -> list[list[int]]:
        return sampled_token_ids.tolist()

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        names = self.input_batch.req_ids
        tokens = self._to_list(self._sample(self.hidden, None).sampled_token_ids)
        for name, of_name in zip(names, tokens, strict=True):
            self.requests[name].output_token_ids += of_name
        return sampled(names, tokens)


class FakeV2:
    """As much of vLLM's V2 runner as its adapter relies on: it forgets preempted requests,
    gets resumed ones as new, and asks the model's `ModelState` for inputs and metadata."""

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        for name in gone:
            self.requests.pop(name, None)
        for new in scheduler_output.scheduled_new_reqs:
            assert new.num_computed_tokens == len(new.prefill_token_ids) - 1
            self.requests[new.req_id] = list(new.prefill_token_ids)
        cached = scheduler_output.scheduled_cached_reqs
        assert not cached.resumed_req_ids
        for index, name in enumerate(cached.req_ids):
            assert cached.num_computed_tokens[index] == len(self.requests[name]) - 1
            assert cached.new_block_ids[index] is None
        counts = scheduler_output.num_scheduled_tokens
        self.step_requests = sort_batch_req_ids(counts, {}, 1)[::-1]
        if not counts:
            return ModelRunnerOutput(req_ids=[], req_id_to_index={})
        buffers = InputBuffers(len(counts), len(counts), torch.device("cpu"))
        batch = InputBatch.make_dummy(len(counts), len(counts), buffers)
        batch.req_ids = self.step_requests
        assert self.model_state.prepare_attn(batch) == {}
        self.hidden = self.model_state.prepare_inputs(batch, None)["decoded"]
        return None

    def sample_tokens(self, grammar_output: Any) -> AsyncModelRunnerOutput:
        tokens = self.hidden[:, 0].tolist()
        for name, token in zip(self.step_requests, tokens, strict=True):
            self.requests[name].append(token)
        output = sampled(self.step_requests, [[token] for token in tokens])
        later = {
            "get_output": lambda self: output,
            "model_runner_output": output,
            "sampler_output": SimpleNamespace(sampled_token_ids=self.hidden[:, :1].long()),
        }
        return type("Later", (AsyncModelRunnerOutput,), later)()


def sampled(names: list[str], tokens: list[list[int]]) -> ModelRunnerOutput:
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=tokens,
    )


class FakeLoop:
    """The loop over the fakes, mixed in before an adapter and its fake runner."""

    def __init__(
        self,
        vllm_config: Any,
        num_blocks: int,
        quorum: float | str,
        exit_interval: int,
        eager: int = 0,
    ) -> None:
        self.vllm_config = vllm_config
        self.device = torch.device("cpu")
        self.requests: dict[str, Any] = {}
        self.model_state = LoopedModelState.__new__(LoopedModelState)
        self._init_loop()
        depth = vllm_config.model_config.hf_config.max_loops
        options = EngineOptions.of(vllm_config.additional_config)
        planes = options.last_plane(depth)
        self.kv_cache_config = KVCacheConfig(num_blocks, [], [None] * planes)
        length = vllm_config.model_config.max_model_len
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        slots = options.positions_in_flight
        stairs = Staircases(depth, options.last_exited, options.full_prefill, slots, planes=planes)
        tables = BlockTables(planes, -(-length // BLOCK), num_blocks, BLOCK)
        self.executor = FakeExecutor(stairs, tables, budget, exit_interval)
        rule = quorum_for(quorum, depth)
        if eager:
            rule = EagerQuorum(rule, eager)
        halting = HaltingRule("threshold", 0.9, 1, depth, exit_interval, 0.0)
        overlap = options.overlaps(False)
        runner = StepRunner(
            stairs,
            self.executor,
            rule,
            budget,
            overlap,
            overlap,
            options.reads_late,
            waves_of(options, stairs),
        )
        self._sequences = RunningSequences(
            self.executor, stairs, tables, runner, halting, budget, length, options
        )
        self.executor.batch = self._sequences
        self.described: list[StepInput] = []

    def describe(self, scheduler_output: Any) -> StepInput:
        self.described.append(super().describe(scheduler_output))
        return self.described[-1]


class FakeV1Runner(FakeLoop, V1Adapter, FakeV1):
    pass


class FakeV2Runner(FakeLoop, V2Adapter, FakeV2):
    pass


RUNNERS = {"v1": FakeV1Runner, "v2": FakeV2Runner}


LOOPUS = ("kv_policy", "prefill_depth", "overlap", "late_verdicts", "speculate", "kv_planes")


@cache
def engine_config(**options: Any) -> Any:
    """vLLM's configuration for a small model; blocks of four tokens."""
    max_loops = options.pop("max_loops")
    loopus = {name: options.pop(name) for name in LOOPUS}
    if ahead := loopus["speculate"]:
        loopus["speculate"] = {"draft_depth": ahead[0], "lookahead": ahead[1]}
    else:
        loopus["speculate"] = "off"
    config = EngineArgs(
        model=str(GOLDEN / "qwen3"),
        hf_overrides={"max_loops": max_loops},
        additional_config={"loopus": loopus},
        skip_tokenizer_init=True,
        **options,
    ).create_engine_config()
    config.cache_config.block_size = BLOCK
    return config


@dataclass
class Engine:
    """Scheduler and fake runner, stepped by hand."""

    max_loops: int = 4
    max_model_len: int = 40
    num_blocks: int = 200
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 16
    quorum: float | str = 0.5
    policy: str = "fcfs"
    kv_policy: str = "exact"
    prefill_depth: str = "lazy"
    prefix_caching: bool = True
    exit_interval: int = 1
    overlap: str = "off"
    late_verdicts: str = "auto"
    eager: int = 0  # passes in a chain, with an `EagerQuorum`
    speculate: tuple[int, ...] = ()  # draft depth and lookahead
    kv_planes: str = "all"
    runner_kind: str = "v1"
    outputs: dict[str, list[int]] = field(default_factory=dict)
    depths: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    stop_reasons: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = engine_config(
            max_loops=self.max_loops,
            kv_policy=self.kv_policy,
            prefill_depth=self.prefill_depth,
            overlap=self.overlap,
            late_verdicts=self.late_verdicts,
            speculate=self.speculate,
            kv_planes=self.kv_planes,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            scheduling_policy=self.policy,
            enable_prefix_caching=self.prefix_caching,
        )
        config.cache_config.num_gpu_blocks = self.num_blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=None)
        self.planes = EngineOptions(kv_planes=self.kv_planes).last_plane(self.max_loops)
        groups = [KVCacheGroupSpec([f"plane.{depth}"], spec) for depth in range(self.planes)]
        self.scheduler = LoopUSScheduler(
            config,
            KVCacheConfig(self.num_blocks, [], groups),
            StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.scheduler.use_v2_model_runner = self.runner_kind == "v2"
        self.runner = RUNNERS[self.runner_kind](
            config, self.num_blocks, self.quorum, self.exit_interval, self.eager
        )
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self.hasher = get_request_block_hasher(BLOCK, hash_function)
        self.stats: list[Any] = []
        self.steps = 0
        self.peak = 0
        self.found: dict[str, list[int]] = {}  # positions in the prefix cache, by depth

    def add(self, name: str, prompt: list[int], max_tokens: int, **more: Any) -> Request:
        names = ("max_loops", "min_loops", "exit_threshold", "exit_depths", "speculate")
        knobs = {key: more.pop(key) for key in names if key in more}
        priority, resumable = more.pop("priority", 0), more.pop("resumable", False)
        # Some get their tokens one by one in any case.
        more.setdefault("temperature", len(prompt) % 3 // 2)
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, extra_args=knobs, **more
            ),
            pooling_params=None,
            arrival_time=float(len(self.outputs)),
            priority=priority,
            resumable=resumable,
            block_hasher=self.hasher,
        )
        self.outputs[name], self.depths[name] = [], []
        self.scheduler.add_request(request)
        return request

    def step(self) -> Any:
        """One engine step, as `EngineCore.step` does it. Returns what was scheduled."""
        scheduled = self.scheduler.schedule()
        for new in scheduled.scheduled_new_reqs:
            deeper = [BLOCK * len(ids) for ids in new.block_ids[1:]]
            self.found[new.req_id] = [new.num_computed_tokens, *deeper]
        result = self.runner.execute_model(scheduled)
        if result is None:
            result = self.runner.sample_tokens(None)
        for of_client in self.scheduler.update_from_output(scheduled, result).values():
            if of_client.scheduler_stats is not None:
                self.stats.append(of_client.scheduler_stats)
            for output in of_client.outputs:
                self.outputs[output.request_id] += output.new_token_ids
                self.depths[output.request_id] += received(output)
                if output.finish_reason is not None:
                    self.reasons[output.request_id] = str(output.finish_reason)
                    self.stop_reasons[output.request_id] = output.stop_reason
        self.steps += 1
        self.check_blocks()
        return scheduled

    def row(self, name: str) -> tuple[Staircases, int]:
        """The worker's arrays, and the row of a request in them."""
        sequences = self.runner._sequences
        return sequences.stairs, sequences.index(name)

    def check_blocks(self) -> None:
        """Scheduler and worker agree on every block, and each one in use holds a position."""
        manager, batch = self.scheduler.kv_cache_manager, self.runner._sequences
        held: list[set[int]] = [set() for _ in range(self.planes)]
        computed: list[set[int]] = [set() for _ in range(self.planes)]
        for request in self.scheduler.running:
            name = request.request_id
            if name not in batch:  # it has just been admitted
                continue
            index, stairs = batch.index(name), batch.stairs
            table = batch._tables._tables[index]
            for depth, ids in enumerate(manager.get_block_ids(name)):
                assert table[depth].tolist() == ids + [0] * (table.shape[1] - len(ids))
                held[depth] |= set(ids) - {0}
                if depth < stairs.max_depth[index]:
                    positions = set(range(stairs.done[index, depth + 1]))
                    if stairs.last_exited:
                        positions |= set(range(stairs.prefill_end[index], stairs.done[index, 0]))
                    if depth == 0:  # those known and the next one may have their blocks
                        positions |= set(range(len(batch.tokens(name)) + 1))
                    computed[depth] |= {
                        int(table[depth, p // BLOCK]) for p in positions if p < self.max_model_len
                    } - {0}
        # A pass that was prepared, or for a guess that was wrong, may have taken blocks.
        if self.overlap == "on" or self.speculate:
            assert all(mine <= all_ for mine, all_ in zip(computed, held, strict=True))
        else:
            assert held == computed
        assert manager._promised_in_all == sum(manager._promised.values())
        in_use = [len(ids) for ids in held]
        assert in_use == self.scheduler.blocks_by_depth()
        assert sum(in_use) == self.num_blocks - 1 - self.free_blocks
        self.peak = max(self.peak, sum(in_use))

    def run(self, most_steps: int = 10_000) -> None:
        """Steps until nothing is left to do."""
        while self.scheduler.has_requests():
            assert self.steps < most_steps, "it does not finish"
            self.step()

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
