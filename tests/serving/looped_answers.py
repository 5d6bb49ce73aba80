"""Requests with known answers of a looped model, and an engine's answers compared with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import GOLDEN_LOOPED, admit_too_many, counter, kv_manager
from vllm_loopus import exit_depths

OURO = GOLDEN_LOOPED / "ouro"
BLOCK = 32  # tokens, of the engines that tests make
# Arguments of an engine for it: the most loops that its golden answers have.
OURO_LOOPS: dict[str, Any] = {"skip_tokenizer_init": True, "hf_overrides": {"total_ut_steps": 6}}


def ouro_cases() -> list[dict[str, Any]]:
    """Answers of Ouro's own code in which a token has one exit depth, with our knobs. A fixed exit
    step is a budget."""
    cases = json.loads((OURO / "expected.json").read_text())["cases"]
    return [{**case, "knobs": _knobs(case)} for case in cases if not case["use_weighted_exit"]]


def _knobs(case: dict[str, Any]) -> dict[str, Any]:
    if (step := case["exit_at_step"]) is not None:
        return {"max_loops": step + 1, "exit_threshold": 2.0}
    return {"max_loops": case["total_ut_steps"], "exit_threshold": case["early_exit_threshold"]}


def answers(llm: Any, cases: list[dict[str, Any]], **sampling: Any) -> list[Any]:
    """vLLM's outputs of greedy requests, one for each case."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=len(case["tokens"]),
            ignore_eos=True,
            detokenize=False,
            seed=case.get("seed"),
            extra_args=case["knobs"],
            **sampling,
        )
        for case in cases
    ]
    prompts = [{"prompt_token_ids": case["prompt"]} for case in cases]
    outputs: list[Any] = llm.generate(prompts, params, use_tqdm=False)
    return outputs


def generate(llm: Any, cases: list[dict[str, Any]], **sampling: Any) -> list[Any]:
    """Greedy completions, one for each case."""
    return [output.outputs[0] for output in answers(llm, cases, **sampling)]


def assert_right(llm: Any, cases: list[dict[str, Any]], **sampling: Any) -> list[Any]:
    """All in one batch: tokens and exit depths. Returns vLLM's outputs."""
    outputs = answers(llm, cases, **sampling)
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["tokens"], case
        assert exit_depths(output.outputs[0]) == case["depths"], case
    return outputs


def assert_first_logits(case: dict[str, Any], completion: Any) -> None:
    """`first_logits_top5`, up to a constant: of a completion with 5 log-probabilities or more."""
    expected = {int(token): logit for token, logit in case["first_logits_top5"].items()}
    found = {token: value.logprob for token, value in completion.logprobs[0].items()}
    shift = max(expected.values()) - max(found.values())
    for token, logit in expected.items():
        assert found[token] + shift == pytest.approx(logit, abs=1e-3)


def scarce(loops: int) -> dict[str, Any]:
    """Arguments of an engine that has the blocks of one sequence of 64 tokens for four sequences.
    It counts preemptions."""
    return {
        "disable_log_stats": False,
        "max_model_len": 64,
        "num_gpu_blocks_override": 2 * loops + 1,
        "max_num_seqs": 4,
    }


def _needed_blocks(case: dict[str, Any]) -> int:
    """The last token is not computed."""
    tokens = len(case["prompt"]) + len(case["tokens"]) - 1
    return max(case["depths"]) * -(-tokens // BLOCK)


def assert_right_preempted(llm: Any, cases: list[dict[str, Any]]) -> None:
    """As `assert_right`, on a `scarce` engine that has to preempt: those that need the most blocks
    are first, and four of them at once do not fit, however time passes."""
    admit_too_many(llm)
    assert_right(llm, sorted(cases, key=_needed_blocks, reverse=True))
    assert counter(llm, "vllm:num_preemptions") > 0 or kv_manager(llm).short_of_planes > 0


def copy_of(source: Path, folder: Path, **fields: Any) -> Path:
    """A checkpoint with the weights of `source` and some fields of its config changed."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder
