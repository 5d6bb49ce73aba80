"""The command: what it refuses, what it keeps, what it goes on with. No vLLM engine starts here."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from tests.conftest import GOLDEN
from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.architectures.recursive.config import RecursiveConfig
from vllm_loopus.cli.main import app
from vllm_loopus.evaluation import engines, run
from vllm_loopus.evaluation.models import Setting, looped_model
from vllm_loopus.evaluation.store import Result, Store
from vllm_loopus.evaluation.work import Work

pytestmark = pytest.mark.slow


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever starts an engine fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(run, "running_engine", refuse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loopus-tiny", "--tasks", "tiny_chioce"), "'tiny_chioce' is neither .* tiny_choice"),
        (("loopus-tiny", "--tasks", ","), "tasks='' has no names"),
        (("loopus-tiny", "--tasks", "arc_easy"), "the data of 'arc_easy' is not on this machine"),
        (("loopus-tiny-base",), "loopus-tiny-base is a qwen3 model, not a LoopUS model"),
        (("loopus-tini",), "loopus-tini is neither a folder nor an alias"),
        (("loopus-tiny", "--base", "loopus-tiny"), "base=loopus-tiny is a LoopUS model itself"),
        (("loopus-tiny", "--base", "none", "--base", "loopus-tiny-base"), "none excludes"),
        (("loopus-tiny", "--max-loops", "0"), "max_loops=0 must be from 1"),
        (("loopus-tiny", "--exit-threshold", "-1"), "exit_threshold=-1.0 must be 0 or more"),
        (
            ("loopus-tiny", "--no-early-exit", "--exit-threshold", "0.5"),
            "exit_threshold=0.5 has no effect with --no-early-exit",
        ),
        (("loopus-tiny", "--max-length", "1000"), "max_length=1000 must be at most 512"),
        (("loopus-tiny", "--published"), "the paper has no row .* Qwen3-1.7B"),
        (("loopus-tiny", "--markdown", "--json"), "--markdown and --json exclude each other"),
        ((GOLDEN / "qwen3", "--base", "none"), "has no tokenizer files|tiny-qwen3"),
        ((GOLDEN / "qwen3",), "tiny-qwen3 .*--base none"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(
    no_engine: None, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    import re

    tasks = () if "--tasks" in arguments else ("--tasks", "tiny")
    result = invoke(*arguments, *tasks, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.stderr
    assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(no_engine: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("loopus-tiny", "--tasks", "tiny", "--out", tmp_path / "file")
    assert result.exit_code == 2 and "cannot be written" in result.stderr


def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle, it goes on with the rest; nothing is measured twice, nothing mixed."""
    asked: list[tuple[str, str]] = []
    evaluate = run._evaluate

    def counted(engine: Any, cell: Any, plan: Any) -> Result:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((cell.task.name, cell.setting.label))
        return evaluate(engine, cell, plan)

    def files() -> set[Path]:
        return {file for file in tmp_path.rglob("*") if file.is_file()}

    monkeypatch.setattr(run, "_evaluate", counted)
    options = ("--tasks", "tiny_choice,tiny_generate", "--engine", "hf", "--out", tmp_path)
    arguments = ("loopus-tiny", *options, "--limit", "2")
    stopped = invoke(*arguments)
    assert stopped.exit_code == 130 and "the same command continues" in stopped.stderr
    assert not stopped.stdout
    assert len(files()) == len(asked) == 3

    monkeypatch.setattr(run, "_evaluate", evaluate)
    whole = invoke(*arguments, "--json")
    assert whole.exit_code == 0, whole.stderr
    assert "3 of 6 results" in whole.stderr and "[6/6] tiny_generate" in whole.stderr
    assert len(files()) == 6
    told = json.loads(whole.stdout)
    assert told["rows"][0]["setting"] == "no loop"

    def no_more(*_: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(run, "running_engine", no_more)
        again = invoke(*arguments, "--json")
        assert json.loads(again.stdout) == told
        text = invoke(*arguments)
        assert "Generation ↑" in text.stdout and "k=1" in text.stdout
        markdown = invoke(*arguments, "--markdown").stdout
        assert markdown.startswith("| model | depth | Choice ↑ |") and "lm-eval" in markdown
        for other in (("--limit", "3"), ("--dtype", "float32"), ("--max-length", "100")):
            result = invoke(*arguments, *other)
            assert isinstance(result.exception, AssertionError), other
        # Another threshold changes early exit alone, and base and fixed depth are taken.
        result = invoke(*arguments, "--exit-threshold", "0.51")
        assert "4 of 6 results" in result.stderr

    # The same checkpoint under another name finds its results.
    folder = tmp_path / "elsewhere" / "loopus-tiny"
    folder.parent.mkdir()
    folder.symlink_to(EMBEDDED["loopus-tiny"])
    named = json.loads(invoke(str(folder), *options, "--limit", "2", "--json").stdout)
    assert [row["model"] for row in named["rows"]][1:] == [str(folder)] * 2
    folder.unlink()

    damaged = sorted(files())[0]
    damaged.write_text(damaged.read_text()[:100])
    assert "5 of 6 results" in invoke(*arguments).stderr
    assert json.loads(damaged.read_text())["task"]


def test_a_result_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    result = Result({"limit": 1}, "task", "models/name", "2 loops", {}, {}, 1.0, Work(1, 2, 3, 4))
    monkeypatch.setattr(Path, "write_text", _half_written)
    with pytest.raises(KeyboardInterrupt):
        store.save(result)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    assert store.load("models/name", "task", {"limit": 1}) is None
    monkeypatch.undo()
    store.save(result)
    assert store.load("models/name", "task", {"limit": 1}) == result
    assert store.load("models/name", "task", {"limit": 2}) is None


def _half_written(file: Path, text: str) -> None:
    file.write_bytes(text.encode()[:20])
    raise KeyboardInterrupt


def test_another_checkpoint_is_another_model(tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in EMBEDDED["loopus-tiny"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    original, same, other = copy("original"), copy("same"), copy("other")
    (same / "README.md").write_text("another card")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    prints = [looped_model(str(f), None, None, None).fingerprint() for f in (original, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_settings() -> None:
    fixed, early = looped_model("loopus-tiny", 5, None, 0.4).settings
    assert fixed == Setting(5) and fixed.knobs() == {"min_loops": 5, "max_loops": 5}
    assert early == Setting(5, 0.4) and early.knobs() == {}
    only = looped_model("loopus-tiny", None, True, None)
    assert only.settings == (Setting(only.config.max_loops, only.config.exit_threshold),)
    assert only.decides(only.settings[0])["halting_strategy"] == "threshold"


def test_a_plain_model_on_a_cpu_runs_as_looped_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, and with memory left for others."""
    from vllm_loopus.evaluation.vllm_engine import plain_options
    from vllm_loopus.serving.hooks.cpu_memory import free_cpu_memory

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert plain_options() == {"enforce_eager": True}
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    options = plain_options()
    assert options["enforce_eager"]
    assert 0 < options["kv_cache_memory_bytes"] < 0.5 * free_cpu_memory()[0]


def test_convergence_has_no_confidence_to_leave_at(tmp_path: Path) -> None:
    for file in EMBEDDED["loopus-tiny"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"halting_strategy": "convergence", "convergence_epsilon": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = looped_model(str(tmp_path), 3, None, None)
    assert [setting.exit_threshold for setting in model.settings] == [None, 0.5]
    with pytest.raises(ValueError, match=r"exit_threshold=0.6 has no effect for .* convergence"):
        looped_model(str(tmp_path), 3, None, 0.6)


def test_whole_texts_decide(tmp_path: Path) -> None:
    """Texts of different lengths in one batch, one of them cut, are scored as alone."""
    model = looped_model("loopus-tiny", 4, True, 0.5)
    options = engines.EngineOptions("hf", "float32", 32, batch_size=3)
    requests = [(None, [9] * 3, [7, 8]), (None, [4, 6, 9, 12], [5]), (None, [8] * 40, [3, 5, 7])]
    with engines.running_engine(model, options) as lm:
        lm.apply(model.settings[0])
        together = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        for (_, context, continuation), (likelihood, greedy) in zip(
            requests, together, strict=True
        ):
            alone = _score(lm, [*context, *continuation][-31:], len(continuation))
            assert likelihood == pytest.approx(alone[0], abs=1e-4) and greedy is alone[1]


def _score(lm: Any, ids: list[int], length: int) -> tuple[float, bool]:
    import torch

    logits = lm.model(torch.tensor([ids])).logits[0, -length - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(ids[-length:])
    found = logits[range(length), wanted].sum().item()
    return found, bool((logits.argmax(-1) == wanted).all())


def test_a_model_without_an_exit_rule_has_one_setting(tmp_path: Path) -> None:
    base = AutoConfig.from_pretrained(EMBEDDED["loopus-tiny-base"])
    RecursiveConfig(base_config=base.to_dict(), loops=2).save_pretrained(tmp_path)
    assert looped_model(str(tmp_path), None, None, None).settings == (Setting(2),)
    assert looped_model(str(tmp_path), 1, False, None).settings == (Setting(1),)
    with pytest.raises(ValueError, match=r"--early-exit has no effect .* halting_strategy is none"):
        looped_model(str(tmp_path), None, True, None)
    with pytest.raises(ValueError, match=r"exit_threshold=0\.5 has no effect"):
        looped_model(str(tmp_path), None, None, 0.5)
