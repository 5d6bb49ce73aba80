"""Training of recursive transformers: the loss at each depth, and whole runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_loopus.architectures.recursive.config import RecursiveConfig
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.convert import WriteOptions
from vllm_loopus.recast.recursive import plan
from vllm_loopus.training.metrics import read_metrics
from vllm_loopus.training.objective import Counts
from vllm_loopus.training.recursion import TrainableRecursive, recursive_loss
from vllm_loopus.training.run import train
from vllm_loopus.training.settings import SettingsError, settings_from

LOOPS = 2


@pytest.fixture(scope="module")
def recursive(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain model of the other tests, whose LM head is tied, with LoRA of rank 4."""
    out = tmp_path_factory.mktemp("recursive") / "model"
    planned = plan(Base.open(str(folders["plain"])), loops=LOOPS, lora_rank=4, tie="average")
    planned.write(out, WriteOptions())
    return out


def load(folder: Path) -> Any:
    return TrainableRecursive.from_pretrained(folder, dtype=torch.float32)


def test_the_loss_is_that_of_every_depth(recursive: Path, batch: dict[str, Any]) -> None:
    model = load(recursive)
    labelled, counts = batch["labelled"], Counts(len(batch["labelled"]), 3)
    inputs = batch["input_ids"], batch["position_ids"]
    result = recursive_loss(model, *inputs, labelled, 0.5, counts)
    by_depth = []
    for depth in (1, 2):
        model.config.max_loops = depth
        logits = model(input_ids=inputs[0], position_ids=inputs[1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits[labelled.where], labelled.targets)
        by_depth.append(loss)
    torch.testing.assert_close(result["lm_loss"], by_depth[1].detach())
    torch.testing.assert_close(result["depth_loss"], by_depth[0].detach())
    torch.testing.assert_close(result["loss"], by_depth[1] + 0.5 * by_depth[0])


def test_gradients_with_checkpointing_are_those_without(
    recursive: Path, batch: dict[str, Any]
) -> None:
    """Layers are run again for their gradients, each in its own loop."""
    gradients = []
    for checkpointing in (False, True):
        model = load(recursive).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        labelled = batch["labelled"]
        counts = Counts(len(labelled), 3)
        inputs = batch["input_ids"], batch["position_ids"]
        recursive_loss(model, *inputs, labelled, 0.1, counts)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["all", "lora"])
def test_a_run(content: Callable[..., Any], recursive: Path, part: str) -> None:
    changes = {
        "model": str(recursive),
        "objective": "recursive",
        "recursion": {"train": part, "intermediate_weight": 0.3},
        "save_every": 0,
        "eval_every": 1000,  # before the first step and at the end
    }
    settings = settings_from(content(**changes))
    train(settings)
    lines = read_metrics(settings.output)
    evaluations = [line for line in lines if "eval_loss_depth_1" in line]
    first, last = evaluations[0], evaluations[-1]
    for depth in range(1, LOOPS + 1):
        assert last[f"eval_loss_depth_{depth}"] < first[f"eval_loss_depth_{depth}"] - 0.5
    for line in lines:
        if "loss" in line:
            terms = line["lm_loss"] + 0.3 * line["depth_loss"]
            assert line["loss"] == pytest.approx(terms, rel=1e-4)
    out = settings.output / "model"
    config = RecursiveConfig.from_pretrained(out)
    assert (config.architectures, config.loops, config.max_loops) == (
        ["RecursiveForCausalLM"],
        LOOPS,
        LOOPS,
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (recursive, out))
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    lora = {name for name in before if ".lora_" in name}
    assert changed == lora if part == "lora" else changed > lora
    assert AutoModelForCausalLM.from_pretrained(out).config.lora_rank == 4
    assert "recursive transformer" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "looped"}, "is a recursive transformer; set objective: recursive"),
        ({"objective": "plain"}, "is a recursive transformer; set objective: recursive"),
        ({"objective": "recursive", "model": "plain"}, "is a plain qwen3 model, but objective"),
        ({"objective": "recursive", "model": "looped"}, "is a LoopUS model, but objective"),
        ({"objective": "recursive", "served": {"max_loops": 1}}, "served.max_loops has no effect"),
        ({"recursion": {"train": "some"}}, "recursion.train='some'"),
        ({"recursion": {"intermediate_weight": -1}}, "recursion.intermediate_weight=-1"),
    ],
)
def test_refused(
    content: Callable[..., Any],
    folders: dict[str, Path],
    recursive: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    model = folders.get(str(changes.get("model")), recursive)
    given = content(**{**changes, "model": str(model)})
    with pytest.raises(SettingsError, match=message):
        train(settings_from(given))
    assert not Path(given["output"]).exists()
