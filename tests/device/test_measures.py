"""What the measures look at inside an engine, on a CPU. Their programs: `make rehearse-device`."""

from collections.abc import Callable
from typing import Any

import measures.host
import pytest
import torch
from measures.engines import GRAPH_SIZES, SHAPES, answer
from measures.golden import cases
from measures.one_pass import OnePass, difference

from tests.conftest import GOLDEN, runner_of
from vllm_loopus.bench.models import FIRST_TOKEN
from vllm_loopus.bench.workloads import Generator


@pytest.fixture
def llm(make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("VLLM_LOOPUS_PADDED_ROWS", ",".join(map(str, GRAPH_SIZES[:4])))
    return make_llm(GOLDEN / "qwen3", skip_tokenizer_init=True, enable_prefix_caching=False)


def test_a_pass_by_itself(llm: Any) -> None:
    runner = runner_of(llm)
    with torch.inference_mode():
        one = OnePass.of(runner, 3)
        eager = tuple(output.clone() for output in one(padded=False))
        padded = tuple(output.clone() for output in one())
        with one.attention():
            alone = one.compute()
    assert eager[0].shape == (3, runner.vllm_config.model_config.get_hidden_size())
    assert difference(padded, eager) < 1e-5 and difference(alone, eager) < 1e-5
    assert difference(eager, (eager[0] + 1, eager[1])) > 0.1


def test_every_call_of_the_model_is_seen(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(llm)
    region = type(runner._sequences._executor._regions.reasoning)
    model = type(runner.get_model())
    for owner, name in ((region, "__call__"), (model, "compute_logits")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # as they were, after the test
    calls = measures.host.watch(runner)
    work = Generator(FIRST_TOKEN + 20, 8, 3.0).decode(0, 3, 4, 4)
    assert answer(llm, work.requests, at_once=2) == work.tokens
    assert {call.part for call in calls} == {"encoder", "reasoning", "decoder", "head"}
    found = measures.host.of_calls(calls)
    assert found["calls"] == len(calls) and 0 < found["of_device"] < 1
    assert found["pass_ms"] > 0 and found["boundary_ms"] > 0 and found["gap_ms"] > 0


def test_shapes_and_cases_are_those_that_are_published() -> None:
    for name, billions in (("1.7b", 1.7), ("4b", 4.0)):
        shape = SHAPES[name]
        embedded = shape.base.base_weights  # the LM head's weights are not shared here
        assert embedded == pytest.approx(billions * 1e9, rel=0.05)
        indices = shape.config()["reasoning_layer_indices"]
        assert (indices[0], indices[-1]) == (2, shape.base.layers - 2)
        assert shape.token_weights(8) - shape.token_weights(7) == shape.pass_weights
    assert len(cases("qwen3", None)) > 3 and len(cases("qwen3", 3)) == 3
