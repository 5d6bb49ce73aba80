"""The report of `make smollm2` says what was measured, and whether the loop helps."""

import json
from pathlib import Path

import pytest

from vllm_loopus.smollm2 import report
from vllm_loopus.smollm2.sizes import SIZES
from vllm_loopus.training.thresholds import THRESHOLDS


def looped(tokens: int, losses: list[float]) -> dict[str, float]:
    line: dict[str, float] = {"step": tokens, "seconds": 1.0, "tokens": tokens}
    line |= {f"eval_loss_depth_{depth}": loss for depth, loss in enumerate(losses, 1)}
    line |= {"eval_exit_loss": losses[-1], "eval_exit_depth": 1.5}
    for threshold in THRESHOLDS:
        line[f"eval_threshold_depth_{threshold}"] = 1 + threshold
        line[f"eval_threshold_loss_{threshold}"] = losses[0]
    return line


def row(model: str, setting: str, passes: float | None) -> dict[str, object]:
    score = {"value": 0.25, "error": None}
    scores = {"Text": {"value": 30.5, "error": 1.25}, "Last word": score}
    return {"model": model, "setting": setting, "scores": scores, "passes": passes}


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([3.1, 3.0], "the loop helps"),
        ([3.0, 3.6], "further passes do not help"),
        ([3.6, 3.5], "does not help"),
    ],
)
def test_the_page(
    losses: list[float], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    lines = {
        "looped": [looped(0, [4.0, 5.0]), looped(900, losses)],
        "control": [
            {"step": 0, "seconds": 0.0, "tokens": 0, "eval_loss": 3.3},
            {"step": 9, "seconds": 9.0, "tokens": 900, "eval_loss": 3.2},
        ],
    }
    for name, found in lines.items():
        (out / name).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in found)
        (out / name / "metrics.jsonl").write_text(text)
    (out / "data").mkdir()
    source = {
        "licences": ["PSF-2.0"], "documents": 9, "held_out_documents": 1, "characters": 1234,
    }  # fmt: skip
    (out / "data" / "sources.json").write_text(json.dumps({"Python <reference>": source}))
    commands = []

    def tool(*arguments: str, captured: bool) -> str:
        commands.append(arguments)
        if arguments[0] == "trace":
            Path(arguments[-1]).write_text("<html>")
            return ""
        approximate = "last_exited" in arguments
        rows = [row("run/looped/model", "exit, last_exited" if approximate else "1 loop", 1.5)]
        columns = [
            {"title": "Text", "metric": "word_perplexity"}, {"title": "Last word", "metric": "acc"},
        ]  # fmt: skip
        return json.dumps({"columns": columns, "rows": rows, "about": "today"})

    monkeypatch.setattr(report, "tool", tool)
    report.write(out, SIZES["test"])
    page = (out / "report" / "report.html").read_text()
    assert verdict in page and "Python &lt;reference&gt;" in page
    assert "900 and 900 tokens" in " ".join(page.split())
    assert "exit, last_exited" in page and "30.5 ± 1.2" in page and "25.0" in page
    assert "Suggested exit_threshold: 0.1" in page
    assert [arguments[0] for arguments in commands] == ["eval", "eval", "trace"]
    assert "--by-depth" in commands[0] and commands[0].count("--base") == 2
    found = json.loads((out / "report" / "report.json").read_text())
    assert found["tokens"] == {"looped": 900, "control": 900} and len(found["table"]["rows"]) == 2
