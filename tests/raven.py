"""Golden cases, engines and tiny checkpoints of recurrent-depth models, for the tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conftest import GOLDEN_LOOPED
from vllm_loopus.architectures.raven.config import RavenConfig
from vllm_loopus.architectures.raven.reference import RavenForCausalLM

MODELS = ("huginn", "retro_tinyllama", "retro_llama3")
LOOPS = 16  # of the engines
OPTION = {"zero": "zeros"}  # `initial_state` of a golden case -> the engine's option


def expected(model: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN_LOOPED / model / "expected.json").read_text())
    return content


def table(model: str) -> Path:
    return GOLDEN_LOOPED / model / "initial_state.safetensors"


def initial_state(model: str, of_case: str) -> str:
    """The option for a golden case's `initial_state`."""
    return OPTION.get(of_case, str(table(model)))


def criteria(model: str) -> list[str]:
    """Those with golden cases, `none` first."""
    found = {case["criterion"] for case in expected(model)["cases"]}
    return ["none", *sorted(found - {"none"})]


def cases(model: str, of_state: str, *of_criteria: str) -> list[dict[str, Any]]:
    """Golden cases, each with the `knobs` of its request."""
    return [
        {**case, "knobs": knobs(case)}
        for case in expected(model)["cases"]
        if case["initial_state"] == of_state and case["criterion"] in of_criteria
    ]


def knobs(case: dict[str, Any]) -> dict[str, Any]:
    """The request's knobs for a golden case. A fixed depth is a budget, and the least depth."""
    loops, threshold = case["num_steps"], case["exit_threshold"]
    if threshold is None:
        return {"max_loops": loops, "min_loops": loops}
    return {"max_loops": loops, "exit_threshold": threshold}


def start(
    make_llm: Any, model: str | Path, state: str | None, criterion: str = "none", **options: Any
) -> Any:
    """An engine of `model` (a golden one, or a folder). `state`: the option `initial_state`."""
    loopus = options.pop("loopus", {}) | ({} if state is None else {"initial_state": state})
    overrides = {"halting_strategy": criterion, "max_loops": LOOPS} | options.pop("overrides", {})
    return make_llm(
        GOLDEN_LOOPED / model,
        skip_tokenizer_init=True,
        hf_overrides=overrides,
        additional_config={"loopus": loopus},
        **{"disable_log_stats": False, **options},
    )


def write_olmo2(folder: Path, **fields: Any) -> Path:
    """A random checkpoint of the OLMo-2 layout, as the original's conversion writes it."""
    return write(folder, "olmo2", "retro_tinyllama", **fields)


def write(folder: Path, layout: str, like: str, **fields: Any) -> Path:
    """A random checkpoint with `like`'s config.json and other `fields`."""
    content = json.loads((GOLDEN_LOOPED / like / "config.json").read_text()) | fields
    torch.manual_seed(7)
    config = RavenConfig(**{**content, "layout": layout})
    model = RavenForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if "norm" in name or "ln_f" in name:
            tensor.uniform_(0.7, 1.3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def copy(model: str, folder: Path, **fields: Any) -> Path:
    """A golden checkpoint with other fields in its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN_LOOPED / model / "model.safetensors", folder)
    content = json.loads((GOLDEN_LOOPED / model / "config.json").read_text())
    content = {k: v for k, v in {**content, **fields}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder
