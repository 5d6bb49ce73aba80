"""The checks for a GPU as far as a CPU goes: their plan, limits and report, and the bundle.

`python benchmarks/device/checks.py --tiny` runs them to their last step.
"""

import json
import os
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest

from vllm_loopus.bench.fleet import Timed
from vllm_loopus.bench.sections.decode import compared
from vllm_loopus.bench.workloads import Generator

pytestmark = pytest.mark.slow

DEVICE = Path(__file__).parents[2] / "benchmarks" / "device"
sys.path.insert(0, str(DEVICE))  # its programs stand beside one another, as for a bare machine

bundle, checks, probe = map(import_module, ("bundle", "checks", "probe"))


def test_the_plan_fits_into_ten_minutes() -> None:
    for tiny in (False, True):
        names = [check.name for check in checks.planned(tiny)]
        assert len(set(names)) == len(names)
    full = checks.planned(tiny=False)
    sequences = [check.arguments[1] for check in full if check.name.startswith("speedup")]
    assert sorted(map(int, sequences)) == [1, 16, 64, 256]
    rest = [check.seconds for check in full if not check.name.startswith("speedup_256")]
    assert sum(rest) < 580, "all but the greatest get their whole limit"


def test_the_ideal_counts_layers() -> None:
    told = checks.against_ideal({"runs": [{"seqs": 2, **speedup_row()}]})
    assert told["ideal"] == 2.562
    (row,) = told["rows"]
    assert (row["policy"], row["sequences"], row["speedup"]) == ("last_exited", 2, 2.05)
    assert row["of_ideal"] == pytest.approx(0.8)
    assert row["of_simulated"] > 0 and row["costs_ms"]["c0"] > 0


def speedup_row() -> dict[str, Any]:
    """As `benchmarks/early_exit.py` makes it, where exits make it 2.05 times as fast."""
    work = Generator(vocabulary=100, max_loops=8, mean=3.0).decode(0, 2, 4, 4)

    def timed(passes: int, seconds: float) -> Timed:
        step = {
            "rows": [2] * passes, "pass_seconds": [0.01] * passes, "seconds": 0.01 * passes + 0.005,
            "tokens": 2, "decoder_rows": 0, "running": 2,
        }  # fmt: skip
        steps = [step, {**step, "rows": [1] * passes, "tokens": 1, "running": 1}]
        return Timed([{"tokens": 8, "seconds": seconds, "steps": steps, "peak_blocks": 1}])

    return compared(
        work, "last_exited", 2, 8, timed(3, 1.0), timed(8, 2.05), None, lazy=False
    )  # fmt: skip


def test_a_failing_check_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "device"
    here.mkdir()
    (tmp_path / "early_exit.py").write_text(
        "import json, sys\n"
        "told = {'runs': json.loads(sys.argv[1])}\n"
        "open(sys.argv[sys.argv.index('--write') + 1], 'w').write(json.dumps(told))\n"
    )
    (here / "measures.py").write_text(
        "import json, sys, time\n"
        "what, told = sys.argv[1], sys.argv[sys.argv.index('--write') + 1]\n"
        "time.sleep(60 if what == 'slow' else 0)\n"
        "if what != 'broken':\n"
        "    open(told, 'w').write(json.dumps({'said': what}))\n"
        "print('a word in the log')\n"
        "sys.exit(what == 'wrong')\n"
    )
    monkeypatch.setattr(checks, "HERE", here)
    plan = [
        checks.Check(n, [n], 5 if n == "slow" else 60) for n in ("broken", "wrong", "slow", "ok")
    ]
    plan += [
        checks.Check("speedup_1", [json.dumps([{"seqs": 1, **speedup_row()}])], 60),
        checks.Check("speedup_2", ['[{"policy": "of another time"}]'], 60),
    ]
    monkeypatch.setattr(checks, "planned", lambda tiny: plan)
    written = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["checks.py", "--tiny", "--write", str(written)])
    assert checks.main() == 1
    report = json.loads(written.read_text())
    assert [(c["name"], c["status"]) for c in report["checks"]] == [
        ("broken", "failed"),
        ("wrong", "failed"),
        ("slow", "timeout"),
        ("ok", "passed"),
        ("speedup_1", "passed"),
        ("speedup_2", "failed"),
    ]
    assert "KeyError: 'seqs'" in report["checks"][5]["why"]
    assert report["checks"][1]["result"] == {"said": "wrong"}
    assert "a word in the log" in report["checks"][0]["log"]
    assert report["machine"]["date"] and report["machine"]["packages"]["torch"]
    assert "2 of 6 passed" in capsys.readouterr().out
    assert checks.run(plan[3], limit=1)["status"] == "skipped"

    def repeat(name: str, *options: str) -> int:
        monkeypatch.setattr(sys, "argv", [*sys.argv[:4], *options, "--only", name])
        return int(checks.main())

    # One repeated takes its place among the others.
    plan[0] = checks.Check("broken", ["mended"], 60)
    assert repeat("broken") == 0
    again = json.loads(written.read_text())["checks"]
    assert again[0]["result"] == {"said": "mended"} and again[1:] == report["checks"][1:]
    assert "1 of 1 passed" in capsys.readouterr().out
    for told in ("[]", "{", json.dumps({**report, "machine": {"gpus": ["another"]}})):
        written.write_text(told)
        with pytest.raises(SystemExit, match="2"):
            repeat("broken")
        assert written.read_text() == told
        assert f"{written} is" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        repeat("brocken")
    assert "--only brocken is no check; there are broken, wrong" in capsys.readouterr().err


def test_cut_off_it_leaves_nothing_behind(tmp_path: Path) -> None:
    sleeper = tmp_path / "measures.py"
    started = tmp_path / "started"
    sleeper.write_text(
        f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)\n"
    )
    program = (
        f"import sys, pathlib\nsys.path.insert(0, {str(DEVICE)!r})\nimport checks\n"
        f"checks.HERE = pathlib.Path({str(tmp_path)!r})\n"
        "checks.planned = lambda tiny: [checks.Check('slow', ['slow'], 300)]\n"
        f"sys.argv = ['checks.py', '--tiny', '--write', {str(tmp_path / 'told')!r}]\n"
        "sys.exit(checks.main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        while not (started.is_file() and started.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "probe", lambda: {"gpus": []})
    monkeypatch.setattr(sys, "argv", ["checks.py"])
    assert checks.main() == 2


def test_probe_runs_on_a_bare_python() -> None:
    told = subprocess.run(
        [sys.executable, "-I", "-S", str(DEVICE / "probe.py")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(told)["packages"] == {}
    assert probe.probe()["packages"]["torch"]


def test_bundle_there_and_back(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "big-1-py3-none-any.whl").write_bytes(bytes(range(256)) * 2**13)
    out = tmp_path / "out"
    manifest = bundle.pack(out, wheels, piece=1)
    assert len(manifest["pieces"]) > 1
    assert all(0 < piece["bytes"] <= 2**20 for piece in manifest["pieces"])
    target = tmp_path / "there"
    subprocess.run(
        [sys.executable, str(out / "bundle.py"), "unpack", str(out), str(target)], check=True
    )
    assert (target / "wheels" / "big-1-py3-none-any.whl").stat().st_size == 2**21
    repository = target / "repository"
    assert (repository / "vllm_loopus" / "plugin.py").is_file()
    (found,) = metadata.distributions(path=[str(repository)])
    (plugin,) = found.entry_points.select(group="vllm.general_plugins")
    assert (found.metadata["Name"], plugin.value) == ("vllm-loopus", "vllm_loopus.plugin:register")
    assert (target / "shared" / "golden" / "qwen3" / "expected.json").is_file()
    assert not list(target.rglob("__pycache__"))
    with pytest.raises(SystemExit, match="not empty"):
        bundle.pack(out, None, piece=1)
    damaged = out / manifest["pieces"][0]["name"]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit, match="damaged"):
        bundle.unpack(out, tmp_path / "again")
    damaged.unlink()
    with pytest.raises(SystemExit, match="missing"):
        bundle.unpack(out, tmp_path / "again")
