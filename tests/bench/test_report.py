"""One tiny run through the command line: what it prints and writes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_loopus.bench import figures
from vllm_loopus.bench import report as written
from vllm_loopus.bench import run as bench_run
from vllm_loopus.bench.figures import Figure
from vllm_loopus.bench.ratios import Ratio
from vllm_loopus.bench.setup import TINY, Setup
from vllm_loopus.cli.main import app


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_nothing_failed(report: dict[str, Any]) -> None:
    assert report["failed"] == {}


def test_a_section_that_failed_is_told(report: dict[str, Any], tmp_path: Path) -> None:
    spoilt = {**report, "failed": {"served": "vllm serve ended\nno <port>"}}
    (tmp_path / "spoilt.json").write_text(json.dumps(spoilt))
    done = run("--from", str(tmp_path / "spoilt.json"), "--out", str(tmp_path))
    assert done.exit_code == 1 and "failed: served: no <port>" in done.stderr
    assert "no &lt;port&gt;" in (tmp_path / "report.html").read_text()


def test_all_cells_ran_in_every_round(report: dict[str, Any]) -> None:
    (decode,) = report["decode"]
    assert set(decode["rates"]) == {"base", "plain", "exact off", "exact on"}
    rounds = {len(rates) for rates in decode["rates"].values()}
    assert len(rounds) == 1 and rounds.pop() >= report["plan"]["rounds"]


def test_counts_agree_with_the_simulation_of_the_same_policy(report: dict[str, Any]) -> None:
    (decode,) = report["decode"]
    for row in decode["policies"]:
        rule = row["simulated"]["by_rule"]
        assert row["counts"]["passes"] == pytest.approx(rule["passes"], rel=0.35)
        assert row["counts"]["rows"] == pytest.approx(rule["rows"], rel=0.35)


def test_the_profile_adds_up(report: dict[str, Any]) -> None:
    for row in report["decode"][0]["policies"]:
        parts = row["profile"]["parts"]
        assert sum(parts.values()) == pytest.approx(1)
        assert {"passes: layers", "decoder", "encoder", "LM head", "scheduler"} <= set(parts)
        assert all(share > 0 for share in parts.values())


def test_engines_that_wait_do_not_work(report: dict[str, Any]) -> None:
    assert report["decode"][0]["idle_engines_use"] < 0.1


def test_the_table_is_printed_and_written_between_markers(
    results: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    printed = (results / "printed").read_text()
    assert "early exit on over off" in printed and report["command"] in printed.replace("\n", "")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{figures.MARKERS[0]}\nold\n{figures.MARKERS[1]}\nafter\n")
    done = run("--from", str(results), "--out", str(tmp_path), "--into", str(page))
    assert done.exit_code == 0, done.stderr
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{figures.MARKERS[1]}\nafter\n")
    assert "old" not in text and figures.markdown(report) in text
    before = sorted(file.stat().st_mtime_ns for file in results.iterdir())
    assert run("--from", str(results), "--into", str(results / "printed")).exit_code == 2
    assert run("--from", str(results)).exit_code == 0
    assert before == sorted(file.stat().st_mtime_ns for file in results.iterdir())


def test_a_run_agrees_with_itself_and_not_with_another(results: Path, tmp_path: Path) -> None:
    done = run("--from", str(results), "--out", str(tmp_path), "--compare", str(results))
    assert done.exit_code == 0, done.stdout
    assert "one round" in done.stdout
    other = json.loads((results / "report.json").read_text())
    ratio = other["decode"][0]["policies"][0]["on_over_off"]
    ratio.update(median=99.0, low=98.0, high=100.0)
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = run(
        "--from", str(results), "--out", str(tmp_path), "--compare", str(tmp_path / "other.json")
    )
    assert done.exit_code == 1
    here, other["dtype"] = other["dtype"], "float8"
    (tmp_path / "other.json").write_text(json.dumps(other))
    done = run("--from", str(results), "--compare", str(tmp_path / "other.json"))
    assert done.exit_code == 2 and f"dtype is '{here}' here and 'float8'" in done.stderr


def test_a_figure_with_other_answers_is_not_reached() -> None:
    assert Figure("a", Ratio.of([5.0]), 4.0).reached
    assert not Figure("a", Ratio.of([5.0]), 4.0, valid=False).reached


def test_a_section_that_fails_spoils_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(_: Any) -> dict[str, Any]:
        raise OSError("no such sensor")

    monkeypatch.setattr(bench_run.machine, "measure", measure)
    monkeypatch.setattr(bench_run.quality, "measure", lambda _: {"about": "this"})
    plan = replace(TINY, sections=("machine", "quality"))
    kept: list[dict[str, Any]] = []
    setup = Setup(plan, tmp_path, "float32", "cpu", lambda line: None)
    found = bench_run.run(setup, ["bench"], lambda part: kept.append(dict(part)))
    assert found["failed"] == {"machine": "OSError: no such sensor"}
    assert found["quality"] == {"about": "this"}
    assert "quality" not in kept[0] and "quality" in kept[-1]


def test_the_page_needs_nothing_and_escapes(results: Path, report: dict[str, Any]) -> None:
    assert (results / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (results / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script" not in page
    evil = {**report, "machine": "<script>alert(1)</script>"}
    assert "<script" not in written.page(evil, b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "everything"), "only='everything' has unknown sections"),
        (("--seqs", "4,none"), "seqs='4,none' must be"),
        (("--original", "."), "not a checkout of the original"),
        (("--from", "README.md"), "README.md is not a vllm-loopus bench report"),
        (("--only", "served"), "only='served': the request rate of served depends on decode"),
        (("--out", "README.md"), "is a file"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
