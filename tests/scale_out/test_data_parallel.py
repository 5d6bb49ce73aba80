"""vLLM's own data parallelism: golden answers from two ranks, counted over both."""

import asyncio
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tests.asynchronous import run as run_async
from tests.conftest import GOLDEN
from tests.serving.test_early_exit import MIXED, by_rule, params_of
from vllm_loopus import exit_depths

BACKBONE, RULE = MIXED[0]


def by_engine(name: str) -> dict[str, float]:
    return {
        sample.labels["engine"]: sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == name
    }


def test_two_ranks_answer_as_one_does(
    forked_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes its part of the requests; tokens and depths are the golden ones, and the metrics
    of both add up to what was answered."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    strategy, interval, epsilon = RULE
    cases = by_rule(BACKBONE)[RULE]

    async def run() -> list[Any]:
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(GOLDEN / BACKBONE),
                data_parallel_size=2,
                dtype="float32",
                max_model_len=128,
                block_size=32,
                skip_tokenizer_init=True,
                hf_overrides={
                    "halting_strategy": strategy,
                    "exit_interval": interval,
                    "convergence_epsilon": epsilon,
                },
            )
        )

        async def answer(index: int) -> Any:
            case = cases[index]
            prompt = {"prompt_token_ids": case["prompt"]}
            async for output in engine.generate(prompt, params_of(case), str(index)):
                if output.finished:
                    return output
            raise AssertionError("no end")

        try:
            return await asyncio.gather(*map(answer, range(len(cases))))
        finally:
            engine.shutdown()

    outputs = run_async(run())
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["tokens"]
        assert exit_depths(output) == case["depths"]
        # What is handed on with the statistics, as by Ray Data LLM:
        assert output.metrics.exit_depths == case["depths"]
        assert output.metrics.finish_reason == "length"
    tokens = sum(len(case["tokens"]) for case in cases)
    for name in ("vllm:generation_tokens_total", "vllm:loopus_exit_depth_count"):
        counted = by_engine(name)
        assert set(counted) == {"0", "1"} and all(counted.values())
        assert sum(counted.values()) == tokens
    depths = sum(sum(case["depths"]) for case in cases)
    assert sum(by_engine("vllm:loopus_exit_depth_sum").values()) == depths
