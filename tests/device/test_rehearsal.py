"""The archive for a borrowed GPU: packed, unpacked and imported here, and its stand-ins compared.

All steps, with the dry run of the measures: `make rehearse-device`.
"""

import importlib.util
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pack
import pytest
import rehearse

from tests.device.conftest import DEVICE

HAS_TRITON = importlib.util.find_spec("triton") is not None
with_triton = pytest.mark.skipif(
    not HAS_TRITON,
    reason="not checked: needs Triton, which CPUs do without (benchmarks/device/README.md)",
)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> rehearse.Rehearsal:
    """Packed without wheels, which would need a network, and unpacked."""
    found = rehearse.Rehearsal(tmp_path_factory.mktemp("device"), None, wheels=False)
    packed, unpacked = found.pack(), found.unpack()
    assert 1 < packed["mib"] < 55 and unpacked["wheels"] == 0
    return found


@pytest.mark.engine
def test_it_imports_as_on_a_machine_with_a_gpu(rehearsal: rehearse.Rehearsal) -> None:
    seen = rehearsal.imports()  # from the archive, and nothing that is neither there nor in it
    assert seen["registered"] and seen["triton"] == HAS_TRITON
    assert seen["worker"].endswith("LoopUSWorker")
    assert seen["scheduler"].endswith("LoopUSScheduler")
    assert seen["graphs"] == "FULL"


def test_a_damaged_archive_is_not_unpacked(rehearsal: rehearse.Rehearsal, tmp_path: Path) -> None:
    damaged = rehearse.Rehearsal(tmp_path / "out", None, wheels=False)
    damaged._packed.mkdir()
    for name in ("run.sh", "archive.sha256"):
        (damaged._packed / name).write_bytes((rehearsal._packed / name).read_bytes())
    whole = (rehearsal._packed / "archive.tgz").read_bytes()
    (damaged._packed / "archive.tgz").write_bytes(whole[:-1])
    with pytest.raises(rehearse.StepError, match=r"ended with 1.*FAILED"):
        damaged.unpack()
    assert not any(damaged._work.iterdir())


def test_too_large_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "big-1-py3-none-any.whl").write_bytes(os.urandom(2**20))
    monkeypatch.setattr(pack, "LARGEST", 2**20)
    monkeypatch.setattr(pack, "OF_PROJECT", ("pyproject.toml",))
    monkeypatch.setattr(pack, "add_vllm", lambda archive: None)
    with pytest.raises(SystemExit, match=r"the archive has [\d.]+ MiB: 55 at most"):
        pack.pack(tmp_path / "out", wheels)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(pack, "LARGEST", 2**26)
    pack.pack(tmp_path / "out", wheels)
    with tarfile.open(tmp_path / "out" / "archive.tgz") as archive:
        assert "wheels/big-1-py3-none-any.whl" in archive.getnames()
        contents = archive.extractfile("contents.json")
        assert contents is not None
        assert json.load(contents)["wheels"] == ["big-1-py3-none-any.whl"]


def test_a_vllm_that_has_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "FLASH_CHECK", "if not what stands there today:")
    with pytest.raises(SystemExit, match="is not as expected"):
        pack.pack(tmp_path / "out", tmp_path)


@with_triton
def test_stand_ins_compute_what_vllm_computes(rehearsal: rehearse.Rehearsal) -> None:
    found = rehearsal.stand_ins()
    assert found["compared"] == 26 and found["worst"].keys() == {"float32", "bfloat16"}


@pytest.mark.engine
@with_triton
def test_an_engine_on_a_pretended_gpu_gives_golden_answers(rehearsal: rehearse.Rehearsal) -> None:
    found = rehearsal.engine()
    assert found["cases"] == found["equal_tokens"] == found["equal_depths"] == 2


def test_the_rehearsal_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: rehearse.Rehearsal, *_: Any, **__: Any) -> None:
        self._run([sys.executable, "-c", "print('a word'); raise SystemExit(3)"])

    def not_here(self: rehearse.Rehearsal) -> None:
        raise rehearse.NotCheckedError("needs what is not here")

    for name in ("unpack", "dry_run", "second_call", "imports"):
        monkeypatch.setattr(rehearse.Rehearsal, name, lambda self: {})
    monkeypatch.setattr(rehearse.Rehearsal, "pack", lambda self: {"mib": 1})
    monkeypatch.setattr(rehearse.Rehearsal, "stand_ins", not_here)
    monkeypatch.setattr(rehearse.Rehearsal, "engine", fails)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["rehearse.py", "--out", str(out)])
    assert rehearse.main() == 1
    steps = {line["step"]: line for line in rehearse.read(out / "rehearsal.jsonl")}
    assert steps["pack"]["status"] == "passed" and steps["pack"]["mib"] == 1
    assert steps["engine"]["status"] == "failed" and "a word" in steps["engine"]["why"]
    assert steps["stand-ins"]["status"] == "not checked"
    assert "needs what is not here" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        rehearse.main()
    assert "is not empty" in capsys.readouterr().err


def test_programs_are_there_for_what_the_readme_says() -> None:
    text = (DEVICE / "README.md").read_text()
    for name in ("pack.py", "run.sh", "rehearse.py", "report.py", "there.txt", "wheels.txt"):
        assert (DEVICE / name).is_file() and name in text
