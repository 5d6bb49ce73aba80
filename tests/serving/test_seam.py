"""A second architecture runs on the same engine: no line of `step/`, `core/` or `worker/` knows it.

Its answers are those of Ouro's own code (`golden_looped`). With the options that Ouro lacks, they
are those of the architecture in plain torch.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from tests.conftest import GOLDEN_LOOPED, admit_too_many, counter, kv_manager, spy_on_steps
from tests.serving import second_architecture as second
from vllm_loopus import architectures, exit_depths
from vllm_loopus.plugin import register
from vllm_loopus.serving.hooks.engine_config import LoopedVllmConfig

LOOPS = 6
OPTIONS = {"injects": {"injects": True}, "depth": {"reads_depth": True, "injects": True}}
WEIGHTS = GOLDEN_LOOPED / "ouro" / "model.safetensors"


def golden_cases() -> list[dict[str, Any]]:
    """Those in which a token has one exit depth. A fixed exit step is a budget."""
    cases = json.loads((GOLDEN_LOOPED / "ouro" / "expected.json").read_text())["cases"]
    return [
        {
            "prompt": case["prompt"],
            "tokens": case["tokens"],
            "depths": case["depths"],
            "knobs": {
                "max_loops": case["total_ut_steps"]
                if case["exit_at_step"] is None
                else case["exit_at_step"] + 1,
                "exit_threshold": case["early_exit_threshold"]
                if case["exit_at_step"] is None
                else 2.0,
            },
        }
        for case in cases
        if not case["use_weighted_exit"]
    ]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """What the plugin does for the architectures of the package."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    # The class itself: by its name, vLLM would look at it in a process of its own.
    assert resolve_name(second.RECORD.model) is second.SecondLoopForCausalLM
    ModelRegistry.register_model(second.NAME, second.SecondLoopForCausalLM)
    architectures.ARCHITECTURES.append(second.RECORD)
    architectures.register()
    register()
    assert MODELS_CONFIG_MAP[second.NAME] is LoopedVllmConfig
    yield
    architectures.ARCHITECTURES.remove(second.RECORD)


@pytest.fixture(scope="module", params=["golden", *OPTIONS])
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint, and requests with their answers."""
    fields = OPTIONS.get(request.param, {})
    folder = tmp_path_factory.mktemp("second") / request.param
    second.write_checkpoint(WEIGHTS, folder, max_loops=LOOPS, **fields)
    if request.param == "golden":
        return folder, golden_cases()
    reference, cases, rng = second.Reference(folder), [], random.Random(5)
    for index in range(12):
        prompt = [rng.randrange(320) for _ in range(rng.choice([1, 5, 17, 33]))]
        knobs = {"max_loops": 2 + index % 5, "exit_threshold": rng.choice([0.3, 0.5, 0.7, 2.0])}
        tokens, depths = list(prompt), []
        for _ in range(8):
            token, depth = reference(tokens, knobs["max_loops"], knobs["exit_threshold"])
            tokens.append(token)
            depths.append(depth)
        answer = tokens[len(prompt) :]
        cases.append({"prompt": prompt, "tokens": answer, "depths": depths, "knobs": knobs})
    assert len({depth for case in cases for depth in case["depths"]}) > 3
    return folder, cases


def generate(llm: Any, cases: list[dict[str, Any]]) -> list[Any]:
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=len(case["tokens"]),
            ignore_eos=True,
            detokenize=False,
            extra_args=case["knobs"],
        )
        for case in cases
    ]
    prompts = [{"prompt_token_ids": case["prompt"]} for case in cases]
    return [o.outputs[0] for o in llm.generate(prompts, sampling, use_tqdm=False)]


def assert_right(llm: Any, cases: list[dict[str, Any]]) -> None:
    for case, output in zip(cases, generate(llm, cases), strict=True):
        assert list(output.token_ids) == case["tokens"]
        assert exit_depths(output) == case["depths"]


def test_the_reference_is_the_original(tmp_path: Path) -> None:
    reference = second.Reference(second.write_checkpoint(WEIGHTS, tmp_path / "golden"))
    for case in golden_cases()[::5]:
        tokens = list(case["prompt"])
        for token, depth in zip(case["tokens"], case["depths"], strict=True):
            assert reference(tokens, **rename(case["knobs"])) == (token, depth)
            tokens.append(token)


def rename(knobs: dict[str, Any]) -> dict[str, Any]:
    return {"max_loops": knobs["max_loops"], "threshold": knobs["exit_threshold"]}


def test_alone_in_a_batch_and_from_the_prefix_cache(make_llm: Any, setting: Any) -> None:
    folder, cases = setting
    llm = make_llm(folder, skip_tokenizer_init=True, disable_log_stats=False)
    for case in cases[::3]:
        assert_right(llm, [case])
    for _ in range(2):
        assert_right(llm, cases)
    assert counter(llm, "vllm:prefix_cache_hits") > 0


def test_chunks(make_llm: Any, setting: Any) -> None:
    folder, cases = setting
    llm = make_llm(folder, skip_tokenizer_init=True, max_num_batched_tokens=16, max_num_seqs=8)
    steps = spy_on_steps(llm)
    assert_right(llm, cases)
    assert max(rows for step in steps for rows in step.passes) == 16


def test_preemption(make_llm: Any, setting: Any) -> None:
    folder, cases = setting
    short = [case for case in cases if 24 < len(case["prompt"]) <= 32] or cases
    llm = make_llm(
        folder,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        max_model_len=64,
        num_gpu_blocks_override=2 * LOOPS + 1,
        max_num_seqs=4,
    )
    admit_too_many(llm)
    assert_right(llm, short)
    assert counter(llm, "vllm:num_preemptions") > 0 or kv_manager(llm).short_of_planes > 0


def test_padded_as_for_graphs(make_llm: Any, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loopus.serving.worker import regions

    monkeypatch.setenv(regions.PADDED_ROWS, "1,2,4,8,16,24")
    folder, cases = setting
    llm = make_llm(folder, skip_tokenizer_init=True, max_num_batched_tokens=40, max_num_seqs=12)
    assert_right(llm, cases)


def test_last_exited_where_it_changes_nothing(make_llm: Any, setting: Any) -> None:
    folder, cases = setting
    same = [case for case in cases if len(set(case["depths"])) == 1]
    options = {"additional_config": {"loopus": {"kv_policy": "last_exited"}}}
    assert_right(make_llm(folder, skip_tokenizer_init=True, **options), same)


def test_what_is_said_of_it(setting: Any) -> None:
    from vllm_loopus.serving.model.facts import ModelFacts, layout_of

    folder, _ = setting
    config = second.SecondConfig.from_pretrained(folder)
    layout = layout_of(config, dtype_bytes=4)
    facts = ModelFacts.of(config, layout)
    assert (facts.kind, facts.encoder, facts.reasoning) == (
        "Second",
        "no layer",
        "layers 0-2 (3)",
    )
    assert ("injected" in layout.items()) == config.injects
    assert sum(layout.items().values()) == layout.allocated(LOOPS)
