"""The tables that are made of the results of a borrowed GPU."""

import sys
from pathlib import Path

import pytest
import report
from results import append

LINES = [
    {"call": [], "tiny": False, "machine": {"gpus": [{"name": "a card"}], "cpu": "a CPU"},
     "at": "2026-11-30T12:00:00"},
    {"measure": "golden_qwen3",
     "values": {"equal_tokens": 4, "equal_depths": 3, "cases": 4, "attention": "TRITON_ATTN",
                "runner": "GPUModelRunner"}},
    {"measure": "golden_qwen3", "status": "failed"},
    {"measure": "passes_4b", "values": {"floor_ms": 1.5}},
    {"measure": "passes_4b",
     "values": {"rows": 16, "eager_ms": 6.0, "eager_over_floor": 4.0, "graph_ms": 1.8,
                "graph_over_floor": 1.2}},
    {"measure": "passes_4b", "values": {"rows": 1, "eager_ms": 6.0, "eager_over_floor": 4.0}},
    {"measure": "speed_4b_exact",
     "values": {"sequences": 16, "off_tokens_s": 600.2, "on_tokens_s": 1200.4, "ratio": 2.0,
                "ideal": 2.5, "of_ideal": 0.8}},
    {"measure": "host_4b_exact",
     "values": {"sequences": 16, "policy": "exact", "of_device": 0.9, "gap_ms": 0.1,
                "pass_ms": 1.8, "row_us": 2.0, "boundary_ms": 0.6}},
    {"measure": "compiled_4b",
     "values": {"rows": 16, "ms": 1.8, "compiled_ms": 1.75, "gain": 0.0286}},
    {"measure": "training",
     "values": {"trained": "looped", "tokens": 1000, "before": {"eval_loss_depth_1": 4.0},
                "metrics": {"eval_loss_depth_1": 3.5, "eval_accuracy_depth_1": 0.3}}},
]  # fmt: skip


def test_ratios_and_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "predicted", lambda measured: 0.95)
    text = "\n".join(report.text_of(LINES, predict=True))
    for row in (
        "a card, 2026-11-30\n",
        "| golden_qwen3 | 4 of 4 | 3 of 4 | TRITON_ATTN | GPUModelRunner |",
        "| passes_4b | 16 | 6.00 | 4.00 | 1.80 | 1.20 |",
        "| passes_4b | 1 | 6.00 | 4.00 |  |  |",
        "| speed_4b_exact | 16 | 600 | 1200 | 2.00 | 2.50 | 0.80 |",
        "| host_4b_exact | 16 | 0.90 | 0.95 | 0.10 | 1.80 | 0.60 |",
        "| compiled_4b | 16 | 1.80 | 1.75 | 2.9 % |",
        "| trained | tokens | loss_depth_1 |",
        "| looped | 1000 | 4.000 to 3.500 |",
        "| golden_qwen3 | failed |",
    ):
        assert row in text


def test_a_dry_run_is_called_one() -> None:
    line = {**LINES[0], "tiny": True}
    assert "the numbers mean nothing" in "\n".join(report.text_of([line], predict=False))


def test_it_reads_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["report.py", str(file)])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert f"{file} has no results" in capsys.readouterr().err
    for line in LINES:
        append(file, line)
    report.main()
    assert "| speed_4b_exact | 16 | 600 |" in capsys.readouterr().out
