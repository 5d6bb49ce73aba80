"""Recurrent depth in the engine: the original's answers, whatever runs beside a request."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from safetensors.torch import load_file

import vllm_loopus
from tests import raven
from tests.conftest import FORKED, GOLDEN_LOOPED, counter, runner_of, spy_on_steps
from tests.raven import LOOPS, start
from tests.serving import looped_answers
from tests.serving.looped_answers import (
    BLOCK,
    assert_first_logits,
    assert_right_preempted,
    generate,
    scarce,
)
from vllm_loopus.architectures.raven.reference import RavenForCausalLM
from vllm_loopus.bench.server import running_server

CHECKPOINTS = Path(vllm_loopus.__file__).parent / "checkpoints"
GUESSES = {"speculate": {"draft_depth": 2, "lookahead": 3}}


def assert_right(llm: Any, cases: list[dict[str, Any]]) -> None:
    for case, output in zip(
        cases, looped_answers.assert_right(llm, cases, logprobs=5), strict=True
    ):
        if "first_logits_top5" in case:
            assert_first_logits(case, output.outputs[0])


def assert_trace(llm: Any, model: str, state: str) -> None:
    """States and constant input of a prompt, and the logits after it, are the original's."""
    trace = load_file(GOLDEN_LOOPED / model / "trace.safetensors")
    served, states, injected = runner_of(llm).get_model(), [], []
    refine, encode = served.refine, served.encode

    def seen_refine(*args: Any) -> Any:
        result = refine(*args)
        states.append(result[0].clone())
        return result

    def seen_encode(*args: Any) -> Any:
        result = encode(*args)
        states.append(result[0].clone())
        injected.append(result[1].clone())
        return result

    served.refine, served.encode = seen_refine, seen_encode
    prompt, knobs = raven.expected(model)["trace_prompt"], {"max_loops": 8, "min_loops": 8}
    (output,) = generate(llm, [{"prompt": prompt, "tokens": [0], "knobs": knobs}], logprobs=5)
    del served.refine, served.encode
    assert torch.allclose(injected[0], trace["injected"], rtol=0, atol=1e-4)
    assert torch.allclose(torch.stack(states), trace[f"states_{state}"], rtol=0, atol=1e-4)
    expected = trace[f"logits_{state}"][7].log_softmax(-1)
    for token, value in output.logprobs[0].items():
        assert value.logprob == pytest.approx(float(expected[token]), abs=1e-3)


def answers_of(model: str, state: str, criterion: str) -> list[dict[str, Any]]:
    """Golden cases of an engine with one criterion: those of fixed depths too."""
    return raven.cases(model, state, *{"none", criterion})


def alone_and_together(make_llm: Any, model: str, state: str, criterion: str) -> None:
    llm = start(make_llm, model, raven.initial_state(model, state), criterion)
    assert_trace(llm, model, state)
    cases = answers_of(model, state, criterion)
    for case in cases[::7]:
        assert_right(llm, [case])
    for _ in range(2):
        assert_right(llm, cases)
    whole_block = any(len(case["prompt"]) > BLOCK for case in cases)
    assert (counter(llm, "vllm:prefix_cache_hits") > 0) == whole_block


def in_chunks(make_llm: Any, model: str, state: str, criterion: str) -> None:
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
    llm = start(make_llm, model, raven.initial_state(model, state), criterion, **options)
    steps = spy_on_steps(llm)
    assert_right(llm, answers_of(model, state, criterion))
    assert max(rows for step in steps for rows in step.passes) == 16


def under_preemption(make_llm: Any, model: str, state: str, criterion: str) -> None:
    chosen = raven.initial_state(model, state)
    llm = start(make_llm, model, chosen, criterion, **scarce(LOOPS))
    cases = [c for c in answers_of(model, state, criterion) if len(c["prompt"]) > 16]
    assert_right_preempted(llm, cases)


def with_guesses(make_llm: Any, model: str, state: str, criterion: str) -> None:
    chosen = raven.initial_state(model, state)
    llm = start(make_llm, model, chosen, criterion, loopus=GUESSES)
    steps = spy_on_steps(llm)
    assert_right(llm, answers_of(model, state, criterion))
    assert any(step.guesses for step in steps)


def padded(make_llm: Any, model: str, state: str, criterion: str) -> None:
    from vllm_loopus.serving.worker import regions

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(regions.PADDED_ROWS, "1,2,4,8,16,24")
        options = {"max_num_batched_tokens": 40, "max_num_seqs": 12}
        llm = start(make_llm, model, raven.initial_state(model, state), criterion, **options)
        assert_right(llm, answers_of(model, state, criterion))


def with_prompt_scores(make_llm: Any, model: str, state: str, criterion: str) -> None:
    """The decoder computes a scored prompt from its first position, whatever passes did."""
    llm = start(make_llm, model, raven.initial_state(model, state), criterion)
    cases = [c for c in raven.cases(model, state, criterion) if len(c["prompt"]) > 4]
    outputs = looped_answers.assert_right(llm, cases, prompt_logprobs=0)
    for case, output in zip(cases, outputs, strict=True):
        assert len(output.prompt_logprobs) == len(case["prompt"])


def last_exited_where_it_changes_nothing(
    make_llm: Any, model: str, state: str, criterion: str
) -> None:
    chosen = raven.initial_state(model, state)
    llm = start(make_llm, model, chosen, criterion, loopus={"kv_policy": "last_exited"})
    cases = [c for c in answers_of(model, state, criterion) if len(set(c["depths"])) == 1]
    for _ in range(2):
        assert_right(llm, cases)


WAYS = [
    alone_and_together,
    in_chunks,
    under_preemption,
    with_guesses,
    padded,
    with_prompt_scores,
    last_exited_where_it_changes_nothing,
]
# One setting of each way; all of them are in `test_every_case`.
SETTINGS = [
    (alone_and_together, "huginn", "table", "kl"),
    (in_chunks, "huginn", "zero", "entropy-diff"),
    (under_preemption, "retro_llama3", "table", "latent-diff"),
    (with_guesses, "huginn", "table", "argmax-stability"),
    (padded, "retro_tinyllama", "zero", "latent-diff"),
]


def told(value: Any) -> str:
    return value.__name__ if callable(value) else str(value)


COMBINED = [
    (model, state, criterion)
    for model in raven.MODELS
    for criterion in raven.criteria(model)[1:]
    for state in ("zero", "table")
]
# All settings the first way, and two others in turn.
EVERY = [
    (way, *setting)
    for number, setting in enumerate(COMBINED)
    for way in (WAYS[0], *(WAYS[1 + (2 * number + other) % (len(WAYS) - 1)] for other in (0, 1)))
]


@pytest.mark.parametrize(("way", "model", "state", "criterion"), SETTINGS, ids=told)
def test_golden_cases(
    make_llm: Any, way: Callable[..., None], model: str, state: str, criterion: str
) -> None:
    way(make_llm, model, state, criterion)


@pytest.mark.long
@pytest.mark.parametrize(("way", "model", "state", "criterion"), EVERY, ids=told)
def test_every_case(
    make_llm: Any, way: Callable[..., None], model: str, state: str, criterion: str
) -> None:
    way(make_llm, model, state, criterion)


@pytest.fixture
def ranks_on_one_memory_node(forked_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gives each rank a memory node of its own, or refuses."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "criterion"), [("huginn", "minp-kl"), ("retro_llama3", "latent-diff")]
)
def test_two_ranks(
    make_llm: Any, ranks_on_one_memory_node: None, model: str, criterion: str
) -> None:
    """Logits are gathered for the exit rule. A single K/V head is on both ranks."""
    llm = start(make_llm, model, raven.initial_state(model, "table"), criterion, **TWO_RANKS)
    assert_right(llm, answers_of(model, "table", criterion))


@pytest.mark.long
def test_two_ranks_of_olmo2(make_llm: Any, ranks_on_one_memory_node: None, tmp_path: Path) -> None:
    """The norm over a whole query and key, of which each rank has a part; one key is on both."""
    for kv_heads in (2, 1):
        folder = raven.write_olmo2(tmp_path / str(kv_heads), num_key_value_heads=kv_heads)
        reference = RavenForCausalLM.from_pretrained(folder)
        reference.config.halting_strategy = "kl"
        cases = seeded_cases(reference, [0.0, 0.01, 0.1])
        assert_right(start(make_llm, folder, None, "kl", **TWO_RANKS), cases)


def test_memory_of_a_depth() -> None:
    """What does not fit is refused with what does; planes count, not loops."""
    from vllm_loopus.serving.model.kv_layout import KVLayout
    from vllm_loopus.serving.runners.start_up import check_depth_fits

    cache = SimpleNamespace(block_size=32, num_gpu_blocks_override=None)
    model = SimpleNamespace(max_model_len=100, original_max_model_len=None)
    config = SimpleNamespace(model_config=model, cache_config=cache)
    sizes = {"encoder": 0, "reasoning": 1, "decoder": 0, "kv_bytes": 100, "state_bytes": 100}
    one = 128 * 200  # 4 blocks of 32 tokens of 200 bytes, at one depth
    check_depth_fits(config, KVLayout.of(max_loops=8, **sizes), 8 * one)
    check_depth_fits(config, KVLayout.of(max_loops=8, planes=2, **sizes), 2 * one)
    with pytest.raises(ValueError, match=r"max_loops=8 .*to 7 or less.*max_model_len to 96 or"):
        check_depth_fits(config, KVLayout.of(max_loops=8, **sizes), 8 * one - 1)
    with pytest.raises(ValueError, match=r"max_loops=8 .*; lower kv_planes to 'last:3' or less"):
        check_depth_fits(config, KVLayout.of(max_loops=8, planes=4, **sizes), 4 * one - 1)
    with pytest.raises(ValueError, match=r"max_loops=8 does not fit.*GiB; lower max_model_len"):
        check_depth_fits(config, KVLayout.of(max_loops=8, planes=2, **sizes), one - 1)


def answer(
    model: RavenForCausalLM, prompt: list[int], tokens: int, state: str, **rule: Any
) -> dict[str, Any]:
    """A case as the reference answers it. `rule`: `num_steps`, `exit_threshold`, `seed`."""
    model.config.max_loops, seed = rule["num_steps"], rule.get("seed")
    model.config.exit_threshold = rule["exit_threshold"]
    ids, depths, gap = list(prompt), [], 1.0
    with torch.no_grad():
        for _ in range(tokens):
            output = model(
                torch.tensor([ids]), initial_state=state, seed=seed or 0, logits_to_keep=1
            )
            best = output.logits[0, -1].topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
            depths.append(int(output.exit_depths))
    found = {"prompt": prompt, "tokens": ids[len(prompt) :], "depths": depths, "gap": gap}
    return {**found, "knobs": raven.knobs(rule), "seed": seed}


def seeded_cases(model: RavenForCausalLM, thresholds: list[float]) -> list[dict[str, Any]]:
    rng, prompt = random.Random(2), [random.Random(4).randrange(320) for _ in range(40)]
    return [
        answer(
            model,
            prompt[: rng.choice([3, 17, 40])],
            5,
            "noise",
            num_steps=rng.choice([3, 8]),
            exit_threshold=rng.choice(thresholds),
            seed=seed,
        )
        for seed in [None, 0, 1, 1, 2**63 - 1, -5, 1, None]
    ]


def test_noise_by_seed(make_llm: Any) -> None:
    """The default. Requests share prefixes if their first states are the same, and only then."""
    reference = RavenForCausalLM.from_pretrained(GOLDEN_LOOPED / "retro_tinyllama")
    reference.config.halting_strategy = "latent-diff"
    cases = seeded_cases(reference, [0.0, 0.2, 0.4])
    llm = start(make_llm, "retro_tinyllama", None, "latent-diff")
    hits, long = [], max(cases, key=lambda case: len(case["prompt"]))
    for seed in (11, 11, 12, None, 0):
        before = counter(llm, "vllm:prefix_cache_hits")
        generate(llm, [{**long, "seed": seed}])
        hits.append(counter(llm, "vllm:prefix_cache_hits") - before > 0)
    assert hits == [False, True, False, False, True]  # the engine's own seed is 0
    for _ in range(2):
        assert_right(llm, cases)
    assert_right(llm, cases[2:3])


def test_olmo2(make_llm: Any, tmp_path: Path) -> None:
    """No golden answers: engine and reference agree, in a batch and from the prefix cache."""
    folder = raven.write_olmo2(tmp_path)
    reference = RavenForCausalLM.from_pretrained(folder)
    reference.config.halting_strategy = "kl"
    cases = seeded_cases(reference, [0.0, 0.01, 0.1])
    assert min(case["gap"] for case in cases) > 1e-4
    llm = start(make_llm, folder, None, "kl")
    for _ in range(2):
        assert_right(llm, cases)


def test_depth_far_beyond_training(make_llm: Any) -> None:
    """64 planes; what they take is said at the start."""
    from vllm_loopus.serving.runners.start_up import start_up_summary

    deep = {"overrides": {"max_loops": 64}, "kv_cache_memory_bytes": 2**27}
    llm = start(make_llm, "retro_llama3", "zeros", **deep)
    reference = RavenForCausalLM.from_pretrained(GOLDEN_LOOPED / "retro_llama3")
    rules = [{"num_steps": steps, "exit_threshold": 0.0} for steps in (64, 33, 1)]
    assert_right(llm, [answer(reference, [5, 6, 7], 4, "zeros", **rule) for rule in rules])
    runner = runner_of(llm)
    said = start_up_summary(
        runner.vllm_config, runner.get_model().planes.layout, runner.kv_cache_config
    )
    assert re.search("loops +1 to 64\n", said)
    assert "KiB at 64" in said
    assert "injected" in said


def test_what_is_said_of_it() -> None:
    from vllm_loopus.architectures.raven.config import RavenConfig
    from vllm_loopus.serving.model.facts import ModelFacts, layout_of

    content = json.loads((GOLDEN_LOOPED / "huginn" / "config.json").read_text())
    config = RavenConfig(**{**content, "halting_strategy": "kl"})
    layout = layout_of(config, dtype_bytes=4)
    facts = ModelFacts.of(config, layout)
    assert (facts.encoder, facts.reasoning) == ("layers 0-1 (2)", "layers 2-4 (3)")
    assert (facts.decoder, facts.kind) == ("layers 5-6 (2)", "Recurrent depth, Huginn")
    assert "every loop also runs the coda (2 blocks)" in facts.exit_rule
    assert sum(layout.items().values()) == layout.allocated(16)


@pytest.mark.long
@pytest.mark.parametrize("model", [*raven.MODELS, "olmo2"])
def test_vllm_serve_without_flags(tmp_path: Path, model: str) -> None:
    """A checkpoint as on the hub, with a tokenizer: one command."""
    folder = tmp_path / model
    if model == "olmo2":
        raven.write_olmo2(folder)
    else:
        raven.copy(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / "loopus-tiny" / name, folder)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": FORKED}
    environment["VLLM_LOGGING_LEVEL"] = "INFO"
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        running_server(str(folder), environment=environment, output=output) as address,
    ):
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask(knobs: dict[str, Any], seed: int | None) -> Any:
            return client.completions.create(
                model=str(folder),
                prompt=[5, 6, 7, 8],
                max_tokens=6,
                temperature=0,
                seed=seed,
                logprobs=1,
                extra_body={"ignore_eos": True, "vllm_xargs": {**knobs, "return_exit_depths": 1}},
            ).choices[0]

        first, second = ask({"max_loops": 3}, None), ask({"max_loops": 3}, None)
        assert first.model_extra["exit_depths"] == [3] * 6
        assert first.logprobs == second.logprobs
        other = ask({"max_loops": 3}, 1)
        assert other.logprobs.token_logprobs != first.logprobs.token_logprobs
        assert ask({}, 1).model_extra["exit_depths"] == [LOOPS] * 6
        with pytest.raises(BadRequestError, match=r"num_steps.* is called max_loops here"):
            ask({"num_steps": 3}, None)
    said = log.read_text()
    assert re.search(r"Recurrent depth, .*layout|Recurrent depth, Huginn", said)
    assert "first state" in said
