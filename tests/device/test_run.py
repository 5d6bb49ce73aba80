"""The runner for a borrowed GPU: limits, results at once, and what a second call repeats."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plan
import pytest
import results
import run

from tests.device.conftest import DEVICE

MACHINE = {"gpus": ["a card"]}
PROGRAM = """
import datetime, json, os, pathlib, sys, time
at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
what, options = sys.argv[1], sys.argv[2:]
name, file = options[1], options[3]
with open(file, "a") as lines:
    lines.write(json.dumps({"at": at, "measure": name, "values": {"pid": os.getpid()}}) + "\\n")
meet = pathlib.Path(file).with_name("meet")
if what == "pair":  # ends only if the other one runs meanwhile
    (meet.with_name(name)).touch()
    while not all(meet.with_name(n).exists() for n in ("one", "other")):
        time.sleep(0.01)
time.sleep(60 if what == "slow" else 0)
print("a word in the log")
sys.exit(what == "wrong" and not meet.with_name("mended").exists())
"""


def measure(name: str, what: str, seconds: int = 60) -> plan.Measure:
    return plan.Measure(name, "fake", (what,), seconds, 1)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`call(*options)`: the runner with programs that measure nothing. Results are in `out`."""
    programs = tmp_path / "device" / "measures"
    programs.mkdir(parents=True)
    (programs / "__init__.py").touch()
    (programs / "fake.py").write_text(PROGRAM)
    rounds = [
        (measure("wrong", "wrong"),),
        (measure("slow", "slow", 1),),
        (measure("one", "pair"), measure("other", "pair")),
        (measure("last", "right"),),
    ]
    monkeypatch.setattr(run, "HERE", programs.parent)
    monkeypatch.setattr(run, "probe", lambda: MACHINE)
    monkeypatch.setattr(plan, "full", lambda: rounds)

    def called(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "out"), *options])
        return int(run.main())

    return called


def test_one_that_fails_keeps_no_other_from_running(
    call: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 1
    file = tmp_path / "out" / "results.jsonl"
    lines = results.read(file)
    assert lines[0]["machine"] == MACHINE
    assert results.endings(lines) == {
        "wrong": "failed",
        "slow": "timeout",
        "one": "passed",
        "other": "passed",
        "last": "passed",
    }
    assert all(results.values(lines, name) for name in ("wrong", "slow", "last"))
    (wrong,) = [line for line in lines if line.get("status") == "failed"]
    assert "a word in the log" in wrong["log"]
    assert "=== wrong, failed\na word in the log" in (file.with_name("logs.txt")).read_text()
    assert "3 of 5 passed" in capsys.readouterr().out


def test_a_second_call_repeats_what_has_not_passed(
    call: Callable[..., int], tmp_path: Path
) -> None:
    call()
    file = tmp_path / "out" / "results.jsonl"
    first = results.read(file)
    (tmp_path / "out" / "mended").touch()
    call()
    again = results.read(file)[len(first) :]
    assert list(results.endings(again)) == ["wrong", "slow"]
    assert results.endings(again)["wrong"] == "passed"
    # On another folder, by what was carried there; the new file is complete by itself.
    carried = tmp_path / "carried.jsonl"
    file.rename(carried)
    call("--earlier", str(carried), str(tmp_path / "missing.jsonl"))
    lines = results.read(file)
    assert lines[: len(first)] == first
    ended = [line["measure"] for line in lines if "status" in line]
    assert ended.count("slow") == 3 and ended.count("wrong") == 2 and ended.count("last") == 1
    call("--only", "last")
    assert [line.get("measure") for line in results.read(file)[-2:]] == ["last", "last"]


def test_without_time_the_rest_is_skipped(call: Callable[..., int], tmp_path: Path) -> None:
    assert call("--seconds", str(plan.LEAST - 1)) == 1
    lines = results.read(tmp_path / "out" / "results.jsonl")
    assert set(results.endings(lines).values()) == {"skipped"}


def test_results_of_another_machine_are_not_mixed(
    call: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call("--only", "last")
    file = tmp_path / "out" / "results.jsonl"
    before = file.read_text()
    monkeypatch.setattr(run, "probe", lambda: {"gpus": ["another card"]})
    with pytest.raises(SystemExit, match="2"):
        call()
    assert "earlier results are of another machine" in capsys.readouterr().err
    file.write_text("{\n" + before)
    with pytest.raises(SystemExit, match="2"):
        call()
    assert f"{file}, line 1: not a line of results" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        call("--only", "lost")
    assert "--only lost: no such measure" in capsys.readouterr().err


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    results.append(file, {"measure": "one", "status": "passed"})
    whole = results.read(file)
    with file.open("a") as lines:
        lines.write('{"measure": "tw')
    assert results.read(file) == whole
    results.mend(file)
    results.append(file, {"measure": "two", "status": "passed"})
    assert results.endings(results.read(file)) == {"one": "passed", "two": "passed"}


def test_cut_off_it_leaves_nothing_behind(tmp_path: Path) -> None:
    programs = tmp_path / "measures"
    programs.mkdir()
    (programs / "__init__.py").touch()
    (programs / "fake.py").write_text(PROGRAM)
    program = (
        f"import sys, pathlib\nsys.path.insert(0, {str(DEVICE)!r})\nimport plan, run\n"
        f"run.HERE = pathlib.Path({str(tmp_path)!r})\n"
        "run.probe = lambda: {'gpus': ['a card']}\n"
        "run.chosen = lambda *_: [(plan.Measure('slow', 'fake', ('slow',), 300, 1),)]\n"
        f"sys.argv = ['run.py', '--out', {str(tmp_path / 'out')!r}]\n"
        "sys.exit(run.main())\n"
    )
    file = tmp_path / "out" / "results.jsonl"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while not (found := results.values(results.read(file), "slow")):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(found[0]["pid"], 0)


def test_without_a_gpu_it_says_so(
    call: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "probe", lambda: {"gpus": []})
    assert call() == 2
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_probe_runs_on_a_bare_python() -> None:
    command = [sys.executable, "-I", "-S", str(DEVICE / "measures" / "probe.py")]
    told: dict[str, Any] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    assert told["packages"] == {} and told["gpus"] == []
