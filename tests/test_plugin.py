"""The plugin: version range, re-entrance, every kind of process, and other models untouched."""

import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.conftest import GOLDEN, golden_cases
from vllm_loopus import plugin

PLAIN = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}


def answers_of(llm: Any, prompts: list[list[int]], knobs: list[Any]) -> list[Any]:
    """Greedy completions, one for each prompt."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, extra_args=knob
        )
        for knob in knobs
    ]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(asked, params, use_tqdm=False)]


def answered_by_processes(prompts: list[list[int]], knobs: list[Any]) -> list[Any]:
    """Tokens and depths from an engine core and a worker of their own."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm import LLM

    from vllm_loopus import exit_depths

    llm = LLM(str(GOLDEN / "qwen3"), **PLAIN)
    outputs = answers_of(llm, prompts, knobs)
    llm.llm_engine.engine_core.shutdown()
    return [(list(output.token_ids), exit_depths(output)) for output in outputs]


def test_engine_core_and_worker_processes(in_fork: Callable[..., Any]) -> None:
    """As vLLM starts them: with CPUs, a new interpreter for the engine core and one for its
    worker."""
    cases = [
        case
        for case in golden_cases("qwen3")
        if (case["halting_strategy"], case["q_eval_interval"]) == ("threshold", 1)
    ]
    assert len({case["q_threshold"] for case in cases}) > 1
    knobs = [{"max_loops": case["N"], "exit_threshold": case["q_threshold"]} for case in cases]
    answers = in_fork(answered_by_processes, [case["prompt"] for case in cases], knobs)
    assert answers == [(case["tokens"], case["depths"]) for case in cases]


def plain_answers(llm: Any) -> list[list[int]]:
    return [list(o.token_ids) for o in answers_of(llm, [[1, 2, 3], [5, 6, 7, 8]], [None, None])]


def without_the_plugin(plain: Path, looped: Path) -> tuple[list[list[int]], str]:
    """In a process of its own: answers of a plain model, and the error for a looped one."""
    os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM

    answers = plain_answers(LLM(str(plain), enforce_eager=True, **PLAIN))
    with pytest.raises(Exception) as error:  # vLLM's, whatever it is
        LLM(str(looped), **PLAIN)
    return answers, str(error.value)


def test_other_models_are_untouched(
    tmp_path: Path, in_fork: Callable[..., Any], make_llm: Any
) -> None:
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
    plain = tmp_path / "plain"
    Qwen3ForCausalLM(config).save_pretrained(plain)
    without, error = in_fork(without_the_plugin, plain, GOLDEN / "qwen3")
    assert "lds" in error or "LoopUSForCausalLM" in error  # without the plugin it is not known
    llm = make_llm(plain, enforce_eager=True, **PLAIN)
    assert plain_answers(llm) == without
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


def test_names_of_vllm_stay_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its whole list, and a name of ours if vLLM has a model for it."""
    from vllm.model_executor.models import registry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_loopus.architectures import ARCHITECTURES
    from vllm_loopus.serving.hooks.engine_config import LoopedVllmConfig

    plugin.register()
    models = registry.ModelRegistry.models
    for name, (module, kind) in registry._VLLM_MODELS.items():
        assert models[name].module_name in (module, f"vllm.model_executor.models.{module}")
        assert models[name].class_name == kind
        assert MODELS_CONFIG_MAP.get(name) is not LoopedVllmConfig
    assert {one.name for one in ARCHITECTURES} <= models.keys()

    theirs = registry._LazyRegisteredModel("vllm.model_executor.models.ouro", "OuroForCausalLM")
    monkeypatch.setitem(models, "OuroForCausalLM", theirs)
    monkeypatch.delitem(MODELS_CONFIG_MAP, "OuroForCausalLM")
    plugin.register()
    assert models["OuroForCausalLM"] is theirs and "OuroForCausalLM" not in MODELS_CONFIG_MAP
