"""Golden checkpoints with a tokenizer whose tokens try to be markup, and a browser."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conftest import GOLDEN, golden_cases
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace import tracing
from vllm_loopus.trace.tokens import Vocabulary

KNOBS = ("N", "halting_strategy", "q_threshold", "q_eval_interval", "convergence_epsilon")
HOSTILE = (
    '</script><img src=x onerror="window.hacked=1">',
    "<!--<script>",
    "[red]x[/]",
    "\x1b[2J",
    "\u2028",
    "{{ 7*7 }}",
    "&lt;b&gt;",
    "\u202eabc",
    " ",
    "\n",
    "__proto__",
    "'\"`${x}",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def hostile_text(token_id: int) -> str:
    """The text of a golden checkpoint's token: a character, or something hostile with its id."""
    if 32 < token_id < 127:
        return chr(token_id)
    return f"{HOSTILE[token_id % len(HOSTILE)]}{token_id}"


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    vocabulary = {hostile_text(i): i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=hostile_text(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=512
    )


def settings(backbone: str) -> list[list[dict[str, Any]]]:
    """Golden cases by their knobs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in golden_cases(backbone):
        found.setdefault(json.dumps([case[k] for k in KNOBS]), []).append(case)
    return list(found.values())


def varied(backbone: str, strategy: str, interval: int = 1) -> list[dict[str, Any]]:
    """The golden cases of a strategy whose exit depths vary most."""
    return max(
        (
            cases
            for cases in settings(backbone)
            if cases[0]["halting_strategy"] == strategy and cases[0]["q_eval_interval"] == interval
        ),
        key=lambda cases: len({depth for case in cases for depth in case["depths"]}),
    )


def set_case(model: LoopUSForCausalLM, case: dict[str, Any]) -> None:
    """The checkpoint's halting fields become the golden case's."""
    model.config.update({"min_loops": 1, **{knob: case[knob] for knob in KNOBS}})


@pytest.fixture(scope="session")
def golden_models() -> dict[str, LoopUSForCausalLM]:
    return {
        name: AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
        for name in ("qwen3", "llama", "phi3")
    }


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(tokenizer_of(512), 512, "golden")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Qwen3 golden checkpoint with that tokenizer, a folder."""
    folder = tmp_path_factory.mktemp("hostile") / "<b>golden"
    shutil.copytree(GOLDEN / "qwen3", folder)
    tokenizer_of(512).save_pretrained(folder)
    return folder


def trace_case(
    model: LoopUSForCausalLM, vocabulary: Vocabulary, case: dict[str, Any], **more: Any
) -> tracing.Traced:
    """The trace of a golden case's answer, generated elsewhere."""
    from vllm_loopus.trace.questions import Question

    set_case(model, case)
    model.config.update(more)
    question = Question(None, case["prompt"], fields={"difficulty": case["N"]})
    return tracing.traced(model, vocabulary, question, (case["tokens"], None))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window. Where there is none the test is skipped; on CI it fails."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        reason = "there is no chromium; as root: make browser"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium does not sandbox itself for root.
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=path, args=arguments)
        yield launched
        launched.close()
