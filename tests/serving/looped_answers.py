"""Requests with known answers of a looped model, and an engine's answers compared with them."""

import json
from pathlib import Path
from typing import Any

from tests.conftest import GOLDEN_LOOPED
from vllm_loopus import exit_depths

OURO = GOLDEN_LOOPED / "ouro"
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


def generate(llm: Any, cases: list[dict[str, Any]], **sampling: Any) -> list[Any]:
    """Greedy completions, one for each case."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=len(case["tokens"]),
            ignore_eos=True,
            detokenize=False,
            extra_args=case["knobs"],
            **sampling,
        )
        for case in cases
    ]
    prompts = [{"prompt_token_ids": case["prompt"]} for case in cases]
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


def assert_right(llm: Any, cases: list[dict[str, Any]]) -> None:
    """All in one batch: tokens and exit depths."""
    for case, output in zip(cases, generate(llm, cases), strict=True):
        assert list(output.token_ids) == case["tokens"]
        assert exit_depths(output) == case["depths"]


def copy_of(source: Path, folder: Path, **fields: Any) -> Path:
    """A checkpoint with the weights of `source` and some fields of its config changed."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder
