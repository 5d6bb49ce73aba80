"""Whole runs: what they leave behind, going on after a kill, two processes, and the control."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.room import room_for
from vllm_loopus import LoopUSConfig, LoopUSForCausalLM
from vllm_loopus.cli.main import app
from vllm_loopus.training.checkpoints import FinalModel, last_complete
from vllm_loopus.training.metrics import read_metrics
from vllm_loopus.training.run import train
from vllm_loopus.training.settings import settings_from
from vllm_loopus.training.trainer import PackedTrainer

pytestmark = pytest.mark.slow

Content = Callable[..., dict[str, Any]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(content: dict[str, Any], resume: bool = False) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` of a run in this process."""
    settings = settings_from(content)
    train(settings, resume)
    return read_metrics(settings.output)


def write(content: dict[str, Any], folder: Path) -> Path:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run(content: Content, folders: dict[str, Path]) -> None:
    served = {"max_loops": 4, "exit_threshold": 0.7}
    supervision = {"n_supervision": 2, "n_reasoning_steps": 4, "confidence_input": "update"}
    settings = content(served=served, supervision=supervision, eval_every=5, save_dtype="bfloat16")
    lines = run(settings)
    out = Path(settings["output"])
    losses = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval_exit_loss" in line]
    # It learns, by depth, and what is logged adds up.
    first, last = evaluations[0], evaluations[-1]
    assert all(
        last[f"eval_loss_depth_{r}"] < first[f"eval_loss_depth_{r}"] - 0.5 for r in range(1, 5)
    )
    assert last["eval_accuracy_depth_4"] > first["eval_accuracy_depth_4"]
    assert 1 <= last["eval_exit_depth"] <= 4
    for line in losses:
        terms = line["lm_loss"] + line["mono_loss"] + line["confidence_loss"]
        assert line["loss"] == pytest.approx(terms, rel=1e-4)
        assert line["step"] == 2 * line["batches"]  # two updates a batch
    assert first["tokens"] == 0
    assert [line["batches"] for line in evaluations[1:-1]] == [
        5 * (i + 1) for i in range(len(evaluations) - 2)
    ]
    # The budget ends it, after the batch in which it is used up.
    assert losses[-1]["tokens"] >= settings["tokens"] > losses[-1]["tokens"] * 0.8
    peak = max(line["learning_rate"] for line in losses)
    assert losses[0]["learning_rate"] < peak <= 1e-2
    assert losses[-1]["learning_rate"] < 0.1 * peak

    # The folder that is served.
    config = LoopUSConfig.from_pretrained(out / "model")
    assert config.architectures == ["LoopUSForCausalLM"]
    assert (config.max_loops, config.exit_threshold, config.confidence_input) == (4, 0.7, "update")
    tensors = weights(out / "model")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert config.dtype == torch.bfloat16
    before = weights(folders["looped"])
    changed = {
        name.split(".")[0] for name in tensors if (tensors[name] != before[name].bfloat16()).any()
    }
    assert changed == {"reasoning", "decoder", "q_head"}
    model = LoopUSForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model(**tokenizer("1+1=", return_tensors="pt")).exit_depths is not None
    provenance = json.loads((out / "model" / "provenance.json").read_text())
    assert provenance["tokens"] == losses[-1]["tokens"]
    assert provenance["data_sha256"].keys() == {
        str(folders["rows.jsonl"]),
        str(folders["held_out.jsonl"]),
    }
    assert provenance["metrics"]["eval_exit_loss"] == last["eval_exit_loss"]
    card = (out / "model" / "README.md").read_text()
    assert "reads\nthe update" in card and "eval_accuracy_depth_4" in card
    # Checkpoints can be served as well.
    checkpoint = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert LoopUSConfig.from_pretrained(checkpoint).confidence_input == "update"
    assert LoopUSForCausalLM.from_pretrained(checkpoint).config.architectures == [
        "LoopUSForCausalLM"
    ]
    assert len(list(out.glob("checkpoint-*"))) == 2


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["local", "streamed"])
def test_going_on_after_a_kill(
    kind: str, content: Content, folders: dict[str, Path], tmp_path: Path
) -> None:
    """SIGKILL at any moment; what is logged from then on is what an unbroken run logs."""
    settings = content(eval_every=6, save_every=3, log_every=2, tokens=6000)
    if kind == "streamed":
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text(folders["rows.jsonl"].read_text())
        settings["data"]["sources"] = [{"dataset": str(tmp_path / "set")}]
    unbroken = without_time(run(settings))
    whole = weights(Path(settings["output"]) / "model")

    settings["output"] = str(tmp_path / "killed")
    out = tmp_path / "killed"
    lines = random.randrange(2, len(unbroken) - 8)
    command = [sys.executable, "-m", "vllm_loopus.cli", "train", str(write(settings, tmp_path))]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 400
        while len(read_metrics(out)) < lines and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, f"it was over before line {lines}"
    assert not (out / "model").exists()
    assert without_time(run(settings, resume=True)) == unbroken, f"killed at line {lines}"
    resumed = weights(out / "model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_full_disk(content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second checkpoint and at the model: an error with a file's name, nothing lost."""
    settings = content(save_every=3, tokens=4000)
    out, file = Path(settings["output"]), write(settings, tmp_path)
    original, saved = PackedTrainer.save_model, []

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        saved.append(output_dir)
        with room_for(1000) if len(saved) == 2 else nullcontext():
            original(self, output_dir, _internal_call)

    monkeypatch.setattr(PackedTrainer, "save_model", save_model)
    result = CliRunner().invoke(app, ["train", str(file)])
    assert result.exit_code == 2, result.output
    assert f"{saved[1]} could not be written" in " ".join(result.stderr.split())
    assert last_complete(out, 1) == Path(saved[0]) and not (out / "model").exists()

    write_model = FinalModel.write

    def into_full(*arguments: Any) -> Path:
        with room_for(1000):
            return write_model(*arguments)

    monkeypatch.undo()
    monkeypatch.setattr(FinalModel, "write", into_full)
    result = CliRunner().invoke(app, ["train", str(file), "--resume"])
    assert result.exit_code == 2, result.output
    assert f"nothing was written to {out / 'model'}" in " ".join(result.stderr.split())
    monkeypatch.undo()
    assert not (out / "model").exists() and not list(out.glob(".model-*"))
    result = CliRunner().invoke(app, ["train", str(file), "--resume"])
    assert result.exit_code == 0 and weights(out / "model"), result.output


def test_two_processes_are_as_one(content: Content, tmp_path: Path) -> None:
    """The same batches of 8 rows: as two parts one after the other, or one in each process.

    With a trained encoder, which has a gradient in some updates only.
    """
    supervision = {"n_supervision": 2, "n_reasoning_steps": 3, "train_encoder": True}
    settings = content(supervision=supervision, eval_every=4, save_every=5)
    one = run(settings)
    whole = weights(Path(settings["output"]) / "model")

    settings["output"] = str(tmp_path / "two")
    # Without a GPU these are CPU processes over gloo; with --cpu it would start a single one.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    module = ["-m", "vllm_loopus.cli", "train", str(write(settings, tmp_path))]
    done = subprocess.run(
        [sys.executable, *launch, *module],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_metrics(tmp_path / "two")
    assert len(two) == len(one) > 10
    for ours, theirs in zip(without_time(one), without_time(two), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)
    # There were two: each saved its own generators.
    assert len(list((tmp_path / "two").glob("checkpoint-*/rng_state_1.pth"))) == 2
    # AdamW divides a gradient by its own size: an element whose gradient is rounding alone may move
    # either way. One in 6144 was off by 1.4e-4, on one CPU.
    for name, tensor in weights(tmp_path / "two" / "model").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-3)
        close = torch.isclose(tensor, whole[name], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, name


def test_accumulation_changes_nothing(content: Content, tmp_path: Path) -> None:
    """Parts of 8, 4 or 1 rows, with an update for every step and for every batch."""
    for update in ("step", "batch"):
        supervision = {"n_supervision": 2, "n_reasoning_steps": 3, "update": update}
        found = []
        for micro in (8, 4, 1):
            out = tmp_path / f"{update}-{micro}"
            lines = run(
                content(
                    supervision=supervision,
                    micro_batch_size=micro,
                    output=str(out),
                    tokens=700,
                    save_every=0,
                )
            )
            found.append(without_time(lines))
        assert found[0][-1]["step"] == found[0][-1]["batches"] * (2 if update == "step" else 1)
        for other in found[1:]:
            for ours, theirs in zip(found[0], other, strict=True):
                assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)


def test_the_control(content: Content, folders: dict[str, Path], tmp_path: Path) -> None:
    """The plain base on the same rows: further, and from random weights."""
    looped = run(content(eval_every=100))
    plain = content(
        objective="plain",
        model=str(folders["plain"]),
        output=str(tmp_path / "plain"),
        eval_every=100,
    )
    lines = run(plain)
    # The same rows in the same batches.
    told = [[line["tokens"] for line in run_ if "loss" in line] for run_ in (looped, lines)]
    assert told[0] == told[1]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain" / "model")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    random_weights = {
        **plain,
        "random_weights": True,
        "output": str(tmp_path / "random"),
        "tokens": 700,
    }
    fresh = run(random_weights)
    assert fresh[0]["eval_loss"] != lines[0]["eval_loss"]
    assert fresh[-1]["eval_loss"] < fresh[0]["eval_loss"]


def test_mixed_precision_and_checkpointing(content: Content, tmp_path: Path) -> None:
    """bf16 under autocast, and recomputed layers: close to float32, and float32 weights saved."""
    plain = run(content(tokens=700))
    for number, options in enumerate(
        ({"mixed_precision": "bf16"}, {"gradient_checkpointing": True})
    ):
        out = tmp_path / str(number)
        lines = run(content(tokens=700, output=str(out), **options))
        exact = "gradient_checkpointing" in options
        for ours, theirs in zip(plain, lines, strict=True):
            if "loss" in ours:
                assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5 if exact else 0.05)
        assert weights(out / "model")["decoder.lm_head.weight"].dtype == torch.float32
    assert plain[1]["loss"] != lines[1]["loss"] or exact


def test_unfinished_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step, state, generators in (
        (2, "{}", ["rng_state.pth"]),
        (4, "{}", []),  # no generators yet
        (10, '{"global', ["rng_state.pth"]),  # cut off
        (12, None, ["rng_state.pth"]),
    ):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in generators:
            (folder / name).touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_complete(tmp_path, 1) == tmp_path / "checkpoint-2"
    assert last_complete(tmp_path, 2) is None


def test_refused_before_work(content: Content, folders: dict[str, Path], tmp_path: Path) -> None:
    def told(*options: str, **changes: Any) -> str:
        file = write(content(**changes), tmp_path)
        result = CliRunner().invoke(app, ["train", str(file), *options])
        assert result.exit_code == 2, result.output
        return result.output

    looped, plain = (str(folders[name]) for name in ("looped", "plain"))
    assert "recast" in told(model=plain)
    assert "objective: plain trains plain models" in told(model=looped, objective="plain")
    assert "is neither a folder" in told(model=str(tmp_path / "nowhere"))
    assert "did you mean 'tokens'" in told(tokns=1)
    assert "is not a file" in told(data={"sources": [{"path": "nowhere.jsonl"}]})
    assert "min_loops=9 must be from 1 to max_loops=3" in told(served={"min_loops": 9})
    assert "pip install" in told(attention="xformers") or "CUDA only" in told(attention="xformers")
    if not torch.accelerator.is_available():
        assert "does not train on a CPU" in told(attention="flex_attention")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    assert "give --resume" in told(model=str(tmp_path / "nowhere"))  # before it is looked for
    assert "cannot be written" in told(output=str(tmp_path / "run" / "file" / "deeper"))
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump(settings_from(content(seed=3)).model_dump(mode="json"))
    )
    assert "seed was 3, is 0" in told("--resume")
    (tmp_path / "run" / "model").mkdir()
    assert "this run is finished" in told("--resume", seed=3)
