"""Traces beside a real vLLM engine: the exits shown are the engine's."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import GOLDEN
from tests.trace.conftest import set_case, varied
from vllm_loopus.cli.main import app
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace import tracing
from vllm_loopus.trace.questions import Question
from vllm_loopus.trace.tokens import Vocabulary


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("backbone", "strategy", "interval"),
    [("llama", "threshold", 2), ("qwen3", "cdf", 1), ("phi3", "convergence", 1)],
)
def test_exits_are_the_engines(
    make_llm: Any,
    golden_models: dict[str, LoopUSForCausalLM],
    backbone: str,
    strategy: str,
    interval: int,
) -> None:
    model, cases = golden_models[backbone], varied(backbone, strategy, interval)
    set_case(model, cases[0])
    rule = HaltingRule.from_config(model.config)
    llm = make_llm(
        GOLDEN / backbone,
        hf_overrides={
            "halting_strategy": strategy,
            "exit_interval": interval,
            "convergence_epsilon": rule.convergence_epsilon,
        },
        skip_tokenizer_init=True,
    )
    questions = [Question(None, case["prompt"]) for case in cases]
    answers = tracing.answers_of_vllm(llm, questions, rule, 20, [])
    own = tracing.answers_of_transformers(model, questions[:1], 20, [])
    assert next(own)[0] == answers[0][0]
    nothing = Vocabulary(None, 512, backbone)
    for case, question, answer in zip(cases, questions, answers, strict=True):
        traced = tracing.traced(model, nothing, question, answer)
        assert traced.trace.token_ids == case["tokens"]
        assert traced.trace.exit_depths == traced.trace.engine_exit_depths == case["depths"]
        assert tracing.difference(traced, traced.reference_answer) is None
    stop = cases[0]["tokens"][3]
    ((tokens, depths),) = tracing.answers_of_vllm(llm, questions[:1], rule, 20, [stop])
    length = cases[0]["tokens"].index(stop) + 1
    assert (tokens, depths) == (cases[0]["tokens"][:length], cases[0]["depths"][:length])


@pytest.mark.engine
@pytest.mark.usefixtures("quick_starts")
def test_the_command_checks_both_sides(tmp_path: Path) -> None:
    cases = varied("qwen3", "threshold")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": c["prompt"]}) + "\n" for c in cases))
    told = []
    for number, options in enumerate((["--engine", "vllm"], ["--check"])):
        file = tmp_path / f"{number}.json"
        threshold = str(cases[0]["q_threshold"])
        result = run(
            "trace", GOLDEN / "qwen3", "--prompts", prompts, "--max-tokens", "20",
            "--exit-threshold", threshold, "--json", file, *options,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert f"Both sides agree in tokens and exit depths of {len(cases)}" in result.stderr
        told.append(json.loads(file.read_text()))
    for data, engine in zip(told, ("vllm", "transformers"), strict=True):
        assert data["engine"] == engine
        for case, trace in zip(cases, data["traces"], strict=True):
            assert (trace["token_ids"], trace["exit_depths"]) == (case["tokens"], case["depths"])
    assert told[0]["traces"][0]["engine_exit_depths"] == cases[0]["depths"]
    assert told[1]["traces"][0]["engine_exit_depths"] is None


@pytest.mark.engine
def test_a_difference_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = varied("qwen3", "threshold")[0]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_token_ids": case["prompt"]}))
    wrong = [*case["depths"][:2], 9 - case["depths"][2], *case["depths"][3:]]
    monkeypatch.setattr("vllm_loopus.trace.engine.start", lambda *_, **__: None)
    monkeypatch.setattr("vllm_loopus.trace.engine.shut_down", lambda _: None)
    monkeypatch.setattr("vllm_loopus.trace.engine.answer", lambda *_: [(case["tokens"], wrong)])
    options = ("--max-tokens", "20", "--exit-threshold", case["q_threshold"])
    for engine in (("--engine", "vllm"), ("--check",)):
        result = run("trace", GOLDEN / "qwen3", "--prompts", prompts, *options, *engine)
        assert result.exit_code == 1
        assert "prompt 0: transformers and vLLM differ. token 2: exits at depth" in result.stderr
