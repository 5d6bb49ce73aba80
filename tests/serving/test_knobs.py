"""Knobs of requests and engines: which names and values are refused, and how."""

from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from tests.conftest import GOLDEN
from vllm_loopus import LoopUSConfig
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.knobs.names import REQUEST_KNOBS, objection
from vllm_loopus.serving.knobs.request import KnobError, check_request


@pytest.fixture(scope="module")
def config() -> LoopUSConfig:
    return LoopUSConfig.from_pretrained(GOLDEN / "qwen3")  # max_loops 8


@pytest.mark.parametrize(
    "name",
    ["max_loop", "maxloops", "max-loops", "maxLoops", "MAX_LOOPS", "min_loop", "exit_treshold",
     "exitthreshold", "exit_depth", "return_exit_depth", "loops", "num_loops", "early_exit",
     "exit", "N", "q_threshold", "kv_policy", "exit_quorum", "halting_strategy"],
)  # fmt: skip
def test_meant_to_be_a_knob(config: LoopUSConfig, name: str) -> None:
    with pytest.raises(KnobError, match=name) as caught:
        check_request({name: 2}, config, 16, 128)
    assert caught.value.parameter == name


@pytest.mark.parametrize(
    "name",
    ["kv_transfer_params", "ec_transfer_params", "session_id", "diffusion_max_steps", "depth",
     "complexity", "perplexity_limit", "flexitime", "max_tokens", "min_tokens", "threshold",
     "target_token", "", "x" * 1000],
)  # fmt: skip
def test_belongs_to_others(config: LoopUSConfig, name: str) -> None:
    check_request({name: 2}, config, 16, 128)


def test_arguments_of_the_users_logits_processors() -> None:
    assert objection("loop_penalty") is not None
    assert objection("loop_penalty", custom_processors=True) is None
    assert objection("max_loop", custom_processors=True) is not None
    assert not any(objection(name, True) for name in ("exit_token", "N", "kv_policy"))


def test_suggestions() -> None:
    assert "did you mean max_loops?" in str(objection("max_loop"))
    assert "is called max_loops here" in str(objection("N"))
    assert "--hf-overrides" in str(objection("exit_interval"))
    assert all(knob in str(objection("loop_count")) for knob in REQUEST_KNOBS)


@pytest.mark.parametrize(
    ("extra_args", "parameter", "message"),
    [
        ({"max_loops": 10**5000}, "max_loops", "<a huge integer> must be a whole number"),
        ({"max_loops": -(10**400)}, "max_loops", r"max_loops=-1000.*\.\.\. must be"),
        ({"exit_threshold": 10**400}, "exit_threshold", "must be a finite number"),
        ({"exit_threshold": True}, "exit_threshold", "exit_threshold=True must be"),
        ({"exit_depths": [1] * 17}, "exit_depths", "has 17 entries.*max_tokens is 16"),
        ({"exit_depths": [True]}, "exit_depths", "must be a list of whole numbers"),
        ({"return_exit_depths": "yes"}, "return_exit_depths", "must be 0, 1, true or false"),
        ({"return_exit_depths": [1]}, "return_exit_depths", "must be 0, 1, true or false"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_bad_values(
    config: LoopUSConfig, extra_args: dict[str, Any], parameter: str, message: str
) -> None:
    with pytest.raises(KnobError, match=message) as caught:
        check_request(extra_args, config, 16, 128)
    assert caught.value.parameter == parameter
    assert isinstance(caught.value, VLLMValidationError) and isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 400


def test_exit_depths_without_a_token_limit(config: LoopUSConfig) -> None:
    check_request({"exit_depths": [1] * 128}, config, None, 128)
    with pytest.raises(KnobError, match=r"has 129 entries.*max_model_len is 128"):
        check_request({"exit_depths": [1] * 129}, config, None, 128)


@pytest.mark.parametrize(
    ("efforts", "message"),
    [
        (3, "must be a mapping"),
        ({"huge": 2}, r"no effort 'huge'.*medium"),
        ({"low": 0}, r"\['low'\]=0 must be a whole number"),
        ({"low": True}, r"\['low'\]=True must be a whole number"),
        ({"low": 9}, r"\['low'\]=9 must be at most the served max_loops=8"),
    ],
)
def test_bad_efforts(config: LoopUSConfig, efforts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineOptions.of({"loopus": {"reasoning_effort": efforts}}).check(config)


def test_efforts_are_off_by_default(config: LoopUSConfig) -> None:
    assert not EngineOptions.of(None).reasoning_effort
    EngineOptions.of({"loopus": {"reasoning_effort": {"low": 1, "high": 8}}}).check(config)
