"""Early exit in vLLM against the original's uncached forward: tokens and depths, in float32."""

import random
from collections.abc import Iterable
from typing import Any

import pytest

from tests.conftest import (
    BACKBONES,
    GOLDEN,
    admit_too_many,
    counter,
    golden_cases,
    kv_manager,
    spy_on_steps,
)
from vllm_loopus import exit_depths

RULES = ("halting_strategy", "q_eval_interval", "convergence_epsilon")  # an engine has one


def by_rule(backbone: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in golden_cases(backbone):
        groups.setdefault(tuple(case[name] for name in RULES), []).append(case)
    return groups


LONG = 40  # tokens, so that every sequence grows over a block boundary
# A pool that has no room for that.
SCARCE = {"max_model_len": 96, "num_gpu_blocks_override": 8 * 8 + 1, "max_num_seqs": 8}
SETTINGS = [(backbone, rule) for backbone in BACKBONES for rule in by_rule(backbone)]
MIXED = [setting for setting in SETTINGS if setting[1][:2] == ("threshold", 1)]


def name_of(setting: Any) -> str:
    backbone, (strategy, interval, _) = setting
    return f"{backbone}-{strategy}-{interval}"


def start(make_llm: Any, setting: Any, loopus: dict[str, Any] | None = None, **args: Any) -> Any:
    backbone, (strategy, interval, epsilon) = setting
    return make_llm(
        GOLDEN / backbone,
        hf_overrides={
            "halting_strategy": strategy,
            "exit_interval": interval,
            "convergence_epsilon": epsilon,
        },
        additional_config={"loopus": loopus or {}},
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **args,
    )


def params_of(case: dict[str, Any], **more: Any) -> Any:
    from vllm import SamplingParams

    knobs = {"max_loops": case["N"], "exit_threshold": case["q_threshold"]}
    length = len(case["tokens"])
    defaults = {"temperature": 0, "max_tokens": length, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**defaults, "extra_args": knobs, **more})


def generate(llm: Any, cases: list[dict[str, Any]], **params: Any) -> list[Any]:
    prompts = [{"prompt_token_ids": case["prompt"]} for case in cases]
    outputs = llm.generate(prompts, [params_of(case, **params) for case in cases], use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def assert_golden(cases: list[dict[str, Any]], outputs: Iterable[Any]) -> None:
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.token_ids) == case["tokens"]
        assert exit_depths(output) == case["depths"]


def assert_same(outputs: Iterable[Any], expected: Iterable[Any]) -> None:
    """Completions are equal in tokens and exit depths."""
    for output, other in zip(outputs, expected, strict=True):
        assert output.token_ids == other.token_ids
        assert exit_depths(output) == exit_depths(other)


def assert_same_scores(outputs: Iterable[Any], expected: Iterable[Any]) -> None:
    """As `assert_same`, with reasons and log-probabilities, which are equal up to rounding."""
    for output, other in zip(outputs, expected, strict=True):
        assert_same([output], [other])
        assert output.finish_reason == other.finish_reason
        assert (output.logprobs is None) == (other.logprobs is None)
        for mine, theirs in zip(output.logprobs or (), other.logprobs or (), strict=True):
            assert mine.keys() == theirs.keys()
            for token in mine:
                assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-3)


def assert_chunks_and_hits(llm: Any, budget: int) -> None:
    """Golden answers twice, the second time from the prefix cache; no call has more rows."""
    steps = spy_on_steps(llm)
    cases = by_rule(MIXED[0][0])[MIXED[0][1]]
    hits = counter(llm, "vllm:prefix_cache_hits")
    for _ in range(2):
        assert_golden(cases, generate(llm, cases))
    rows = [n for step in steps for n in [*step.passes, step.decoder_rows]]
    assert 0 < max(rows) <= budget
    assert counter(llm, "vllm:prefix_cache_hits") > hits


def pool(llm: Any) -> Any:
    return kv_manager(llm).block_pool


def drive(
    llm: Any, cases: list[dict[str, Any]], rng: random.Random, aborted: set[int] = frozenset()
) -> dict[int, Any]:
    """Requests arrive at random steps; those of `aborted` are aborted at random ones."""
    engine = llm.llm_engine
    waiting = list(range(len(cases)))
    rng.shuffle(waiting)
    # The engine makes its ids unique; what comes back carries the one given here.
    running: dict[str, int] = {}
    internal: dict[int, str] = {}
    finished: dict[int, Any] = {}
    while waiting or engine.has_unfinished_requests():
        while waiting and rng.random() < 0.6:
            index = waiting.pop()
            request_id = f"{index}-{rng.random()}"
            internal[index] = engine.add_request(
                request_id, {"prompt_token_ids": cases[index]["prompt"]}, params_of(cases[index])
            )
            running[request_id] = index
        for output in engine.step():
            if output.finished:
                finished[running.pop(output.request_id)] = output.outputs[0]
        for request_id in [r for r, index in running.items() if index in aborted]:
            if rng.random() < 0.2:
                engine.abort_request([request_id])
                del running[request_id]
    return finished


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_alone_and_in_one_batch(make_llm: Any, setting: Any) -> None:
    llm = start(make_llm, setting, enable_prefix_caching=False)
    cases = by_rule(setting[0])[setting[1]]
    for case in cases:
        assert_golden([case], generate(llm, [case]))
    assert_golden(cases, generate(llm, cases))
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@pytest.mark.parametrize(
    ("setting", "quorum"),
    [(setting, quorum) for setting in MIXED[:1] for quorum in (0.05, 0.5, 1.0, "auto")]
    + [(setting, quorum) for setting in MIXED[1:] for quorum in (0.05, "auto")]
    + [(setting, "auto") for setting in SETTINGS if setting not in MIXED],
    ids=lambda value: value if isinstance(value, str) else str(value)[:30],
)
def test_random_order_and_arrival(make_llm: Any, setting: Any, quorum: float | str) -> None:
    llm = start(make_llm, setting, {"exit_quorum": quorum}, max_num_seqs=12)
    assert_golden_in_any_order(llm, by_rule(setting[0])[setting[1]])


def assert_golden_in_any_order(llm: Any, cases: list[dict[str, Any]]) -> None:
    """Requests that arrive at random steps; the second time, half of them are aborted."""
    for seed in range(2):
        rng = random.Random(seed)
        aborted = {i for i in range(len(cases)) if seed and rng.random() < 0.5}
        outputs = drive(llm, cases, rng, aborted)
        for index in set(range(len(cases))) - aborted:
            assert_golden([cases[index]], [outputs[index]])
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
@pytest.mark.parametrize("tokens", [16, 48])
def test_chunks(make_llm: Any, setting: Any, tokens: int) -> None:
    llm = start(make_llm, setting, max_num_batched_tokens=tokens, max_num_seqs=min(tokens, 24))
    steps = spy_on_steps(llm)
    cases = by_rule(setting[0])[setting[1]]
    assert_golden(cases, generate(llm, cases))
    rows = [n for step in steps for n in [*step.passes, step.decoder_rows]]
    assert 0 < max(rows) <= tokens


@pytest.mark.parametrize("setting", MIXED, ids=name_of)
def test_prefix_hits_between_knobs(make_llm: Any, setting: Any) -> None:
    """Prompts longer than a block, three times and under several knobs at once."""
    llm = start(make_llm, setting, max_model_len=160)
    cases = by_rule(setting[0])[setting[1]]
    longest = max(len(case["prompt"]) for case in cases)
    long = [case for case in cases if len(case["prompt"]) == longest]
    if longest <= 32:  # golden answers of a prompt are the model's answers to its continuation
        long = [
            {**case, "prompt": case["prompt"] + case["tokens"][:18], "tokens": case["tokens"][18:],
             "depths": case["depths"][18:]}
            for case in long
        ]  # fmt: skip
    assert len({case["q_threshold"] for case in long}) > 1
    # A shallow request publishes depth 1 alone; a deep one goes on from there.
    deep = next(case for case in long if min(case["depths"]) == case["N"] == 8)
    generate(llm, [deep], max_tokens=1, extra_args={"max_loops": 1})
    assert_golden([deep], generate(llm, [deep]))
    assert kv_manager(llm).hits_by_depth == [32] + [0] * 7
    for _ in range(3):
        assert_golden(long, generate(llm, long))
    assert counter(llm, "vllm:prefix_cache_hits") >= 32 * len(long)


@pytest.mark.parametrize("setting", MIXED, ids=name_of)
@pytest.mark.parametrize("quorum", [0.05, 1.0])
def test_preemption(make_llm: Any, long_answers: Any, setting: Any, quorum: float) -> None:
    """Sequences grow over a block boundary in a pool that has no room for it."""
    cases = by_rule(setting[0])[setting[1]][-12:]
    reference = long_answers(setting)
    llm = start(make_llm, setting, {"exit_quorum": quorum}, **SCARCE)
    admit_too_many(llm)
    outputs = generate(llm, cases, max_tokens=LONG)
    assert counter(llm, "vllm:num_preemptions") > 0 and kv_manager(llm).short_of_planes > 0
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.token_ids[:20]) == case["tokens"]
        assert exit_depths(output)[:20] == case["depths"]
    assert_same(outputs, reference)
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1
