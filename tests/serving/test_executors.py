"""The golden answers on more than one rank, and by vLLM's other executors."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import counter
from tests.serving.fake_executor import EagerQuorum
from tests.serving.looped_answers import OURO, OURO_LOOPS, assert_right, ouro_cases
from tests.serving.test_early_exit import MIXED, assert_golden, by_rule, generate, start
from vllm_loopus.serving.worker.nonfinite import WatchedRows

# Llama's and Qwen3's heads are split alike; Phi-3 has its projections in one.
TWO_RANKS = [setting for setting in MIXED if setting[0] != "llama"]
CDF = ("qwen3", next(rule for rule in by_rule("qwen3") if rule[0] == "cdf"))


@pytest.fixture(autouse=True, scope="module")
def _ranks_on_one_memory_node() -> Iterator[None]:
    """vLLM gives each rank a memory node of its own, or refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        yield


def inner(worker: Any) -> Any:
    return getattr(worker, "worker", worker)


def heads_of_rank(worker: Any) -> int:
    return int(inner(worker).model_runner.model.planes.floats()[-1].shape[1])


def record(worker: Any) -> None:
    """On every rank: what each step does is noted from now on."""
    runner = inner(worker).model_runner
    original, steps = runner._sequences.finish, []

    def finish() -> Any:
        progress = original()
        steps.append(
            (progress.stats.passes, progress.exit_depths, progress.taken, progress.complete)
        )
        return progress

    runner._sequences.finish, runner._recorded = finish, steps


def recorded(worker: Any) -> list[Any]:
    steps: list[Any] = inner(worker).model_runner._recorded
    taken, steps[:] = list(steps), []
    return taken


def disturb(worker: Any) -> None:
    """From now on all ranks but the first would let everybody leave at once, and fail them all."""
    runner = inner(worker).model_runner
    if torch.distributed.get_rank() > 0:
        original, watch = runner.model.exit_evidence, runner._sequences._executor._verdicts.watch
        runner.model.exit_evidence = lambda *args: torch.ones_like(original(*args))

        def watch_nan(rows: WatchedRows) -> None:
            watch(replace(rows, sums=torch.full_like(rows.sums, torch.nan)))

        runner._sequences._executor._verdicts.watch = watch_nan


@pytest.mark.parametrize(
    "setting", [*TWO_RANKS, CDF], ids=lambda setting: "-".join(map(str, setting))
)
def test_two_ranks(make_llm: Any, forked_processes: None, setting: Any) -> None:
    """Tokens and depths are the golden ones; both ranks take the same passes, also when one of them
    would decide otherwise by its own numbers."""
    llm = start(
        make_llm,
        setting,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=24,
        max_num_seqs=24,
    )
    cases = by_rule(setting[0])[setting[1]]
    assert setting == CDF or len(cases) >= 20
    assert len({depth for case in cases for depth in case["depths"]}) > 2
    assert llm.collective_rpc(heads_of_rank) == [1, 1]  # each has half of the K/V heads
    llm.collective_rpc(record)
    for disturbed in (False, True) if setting == MIXED[0] else (False,):
        if disturbed:
            llm.collective_rpc(disturb)
            llm.reset_prefix_cache()
        assert_golden(cases, generate(llm, cases))
        first, second = llm.collective_rpc(recorded)
        assert len(first) > 20 and first == second
        assert max(rows for passes, *_ in first for rows in passes) <= 24


def run_ahead(worker: Any, late: bool | None, passes: int) -> None:
    """On every rank: verdicts are read one pass late, or the decoder and chains of `passes` run
    before exits are read."""
    runner = inner(worker).model_runner._sequences.runner
    runner._late = late
    while isinstance(runner.quorum, EagerQuorum):
        runner.quorum = runner.quorum.rule
    if passes:
        runner.quorum = EagerQuorum(runner.quorum, passes)


def two_that_disagree(make_llm: Any, loopus: dict[str, Any], max_num_seqs: int) -> Any:
    """Two ranks whose steps are noted; one would decide otherwise."""
    llm = start(
        make_llm,
        MIXED[0],
        loopus,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=24,
        max_num_seqs=max_num_seqs,
    )
    llm.collective_rpc(record)
    llm.collective_rpc(disturb)
    return llm


def assert_golden_and_alike(llm: Any) -> None:
    cases = by_rule(MIXED[0][0])[MIXED[0][1]]
    assert_golden(cases, generate(llm, cases))
    first, second = llm.collective_rpc(recorded)
    assert len(first) > 20 and first == second


def test_two_ranks_that_run_ahead(make_llm: Any, forked_processes: None) -> None:
    """As above, with each way of running ahead forced."""
    llm = two_that_disagree(make_llm, {"overlap": "on"}, max_num_seqs=24)
    for mode in ((True, 0), (False, 0), (None, 3)):
        llm.collective_rpc(run_ahead, args=mode)
        llm.reset_prefix_cache()
        assert_golden_and_alike(llm)


def test_two_ranks_that_guess(make_llm: Any, forked_processes: None) -> None:
    loopus = {"speculate": {"draft_depth": 2, "lookahead": 4}}
    llm = two_that_disagree(make_llm, loopus, max_num_seqs=4)
    assert_golden_and_alike(llm)
    assert counter(llm, "vllm:loopus_confirmed_guesses") > 0
    assert counter(llm, "vllm:loopus_rejected_guesses") > 0


@pytest.mark.long
def test_two_ranks_of_ouro(make_llm: Any, forked_processes: None) -> None:
    llm = make_llm(OURO, tensor_parallel_size=2, disable_log_stats=False, **OURO_LOOPS)
    llm.collective_rpc(disturb)
    assert llm.collective_rpc(heads_of_rank) == [2, 2]
    assert_right(llm, ouro_cases())


def test_a_worker_process(make_llm: Any, forked_processes: None) -> None:
    llm = start(make_llm, MIXED[0], distributed_executor_backend="mp")
    cases = by_rule(MIXED[0][0])[MIXED[0][1]]
    assert_golden(cases, generate(llm, cases))
