"""The plugin: version range, re-entrance, every kind of process, and other models untouched."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.conftest import GOLDEN, golden_cases
from vllm_loopus import plugin

ANSWER = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, prompts, options, knobs, refused = json.loads(sys.argv[1])
    options = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, **options}
    llm = LLM(model, **options)
    params = [
        SamplingParams(
            temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, extra_args=knob
        )
        for knob in knobs or [None] * len(prompts)
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    answers = [list(o.outputs[0].token_ids) for o in outputs]
    if knobs:
        from vllm_loopus import exit_depths
        answers += [exit_depths(o) for o in outputs]
    if refused:
        try:
            LLM(refused, **options)
        except Exception as error:
            answers.append(str(error))
    print("ANSWER", json.dumps(answers))
"""


def answer(
    tmp_path: Path,
    model: Path,
    prompts: list[list[int]],
    options: dict,
    knobs: list[dict] | None = None,
    refused: Path | None = None,
    **environment: str,
) -> list[Any]:
    """Greedy tokens from a fresh process that has only the installed package; then, with `knobs`
    for each request, the exit depths, and the error that loading the model `refused` raises."""
    script = tmp_path / "answer.py"
    script.write_text(ANSWER)
    result = subprocess.run(
        [
            sys.executable,
            str(script),
            json.dumps([str(model), prompts, options, knobs, refused and str(refused)]),
        ],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(lines[0].removeprefix("ANSWER "))


def test_engine_core_and_worker_processes(tmp_path: Path) -> None:
    """As vLLM starts them: with CPUs, a new interpreter for the engine core and one for its worker,
    whatever the options say."""
    cases = [
        case
        for case in golden_cases("qwen3")
        if (case["halting_strategy"], case["q_eval_interval"]) == ("threshold", 1)
    ]
    assert len({case["q_threshold"] for case in cases}) > 1
    answers = answer(
        tmp_path,
        GOLDEN / "qwen3",
        [case["prompt"] for case in cases],
        {},
        [{"max_loops": case["N"], "exit_threshold": case["q_threshold"]} for case in cases],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    assert answers == [case["tokens"] for case in cases] + [case["depths"] for case in cases]


def test_other_models_are_untouched(tmp_path: Path, make_llm: Any) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "plain")
    prompts = [[1, 2, 3], [5, 6, 7, 8]]
    plain, eager = tmp_path / "plain", {"enforce_eager": True}
    *without, error = answer(
        tmp_path, plain, prompts, eager, refused=GOLDEN / "qwen3", VLLM_PLUGINS=""
    )
    assert "lds" in error or "LoopUSForCausalLM" in error  # without the plugin it is not known
    assert answer(tmp_path, plain, prompts, eager) == without
    llm = make_llm(plain, skip_tokenizer_init=True, **eager)
    vllm_config = llm.llm_engine.vllm_config
    from vllm.engine.arg_utils import EngineArgs

    default = EngineArgs(model=str(tmp_path / "plain"), skip_tokenizer_init=True)
    assert vllm_config.scheduler_config.scheduler_cls == default.scheduler_cls
    core = llm.llm_engine.engine_core.engine_core
    assert len(core.scheduler.kv_cache_config.kv_cache_groups) == 1
    assert type(core.scheduler).__module__.startswith("vllm.")


def test_entry_point() -> None:
    (entry,) = metadata.entry_points(group="vllm.general_plugins", name="loopus")
    assert entry.load() is plugin.register


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.29.0", True),
        ("0.32.1", True),
        ("0.32.0+cpu", True),
        ("0.28.9", False),
        ("0.33.0", False),
    ],
)
def test_version_range(monkeypatch: pytest.MonkeyPatch, version: str, supported: bool) -> None:
    monkeypatch.setattr(plugin, "installed_vllm", lambda: ("vllm", Version(version)))
    message = plugin.unsupported_version()
    assert (message is None) == supported
    if message:
        assert version in message and ">=0.29.0,<0.33" in message


def test_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "installed_vllm", lambda: None)
    assert "vllm-loopus[cpu]" in (plugin.unsupported_version() or "")
