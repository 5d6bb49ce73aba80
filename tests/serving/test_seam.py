"""A further architecture runs on the same engine: no line of `step/`, `core/` or `worker/` knows
it. It has what Ouro lacks; its answers are those of its reference model."""

import random
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch

from tests.conftest import counter, spy_on_steps
from tests.serving import second_architecture as second
from tests.serving.looped_answers import OURO, assert_right, assert_right_preempted, scarce
from vllm_loopus import architectures
from vllm_loopus.plugin import register
from vllm_loopus.serving.hooks.engine_config import LoopedVllmConfig

LOOPS = 6
OPTIONS = {"injects": {"injects": True}, "depth": {"reads_depth": True, "injects": True}}
WEIGHTS = OURO / "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """What the plugin does for the architectures of the package."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    # The class itself: by its name, vLLM would look at it in a process of its own.
    assert resolve_name(second.RECORD.model) is second.SecondLoopForCausalLM
    ModelRegistry.register_model(second.NAME, second.SecondLoopForCausalLM)
    architectures.ARCHITECTURES.insert(0, second.RECORD)  # its config is one of Ouro as well
    architectures.register()
    register()
    assert MODELS_CONFIG_MAP[second.NAME] is LoopedVllmConfig
    yield
    architectures.ARCHITECTURES.remove(second.RECORD)


@pytest.fixture(scope="module", params=[*OPTIONS])
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint, and requests with their answers."""
    folder = tmp_path_factory.mktemp("second") / request.param
    second.write_checkpoint(WEIGHTS, folder, max_loops=LOOPS, **OPTIONS[request.param])
    reference, cases, rng = second.SecondReference.from_pretrained(folder), [], random.Random(5)
    for index in range(12):
        prompt = [rng.randrange(320) for _ in range(rng.choice([1, 5, 17, 33]))]
        knobs = {"max_loops": 2 + index % 5, "exit_threshold": rng.choice([0.3, 0.5, 0.7, 2.0])}
        for name, value in knobs.items():
            setattr(reference.config, name, value)
        tokens, depths = list(prompt), []
        for _ in range(8):
            with torch.no_grad():
                output = reference(torch.tensor([tokens]))
            tokens.append(int(output.logits[0, -1].argmax()))
            depths.append(int(output.exit_depths))
        answer = tokens[len(prompt) :]
        cases.append({"prompt": prompt, "tokens": answer, "depths": depths, "knobs": knobs})
    assert len({depth for case in cases for depth in case["depths"]}) > 3
    return folder, cases


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
    llm = make_llm(folder, skip_tokenizer_init=True, **scarce(LOOPS))
    assert_right_preempted(llm, short)


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
    assert (facts.kind, facts.encoder, facts.reasoning) == ("Second", "no layer", "layers 0-2 (3)")
    assert "injected" in layout.items()
    assert sum(layout.items().values()) == layout.allocated(LOOPS)
