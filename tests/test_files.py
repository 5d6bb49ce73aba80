"""A disk that is full while something is written: the file is named, the earlier one is intact."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.room import room_for
from vllm_loopus import aliases
from vllm_loopus.checkpoints import __path__ as checkpoints
from vllm_loopus.cli.main import app
from vllm_loopus.evaluation.store import Result, Store
from vllm_loopus.files import complete_file, write_text

TINY = Path(checkpoints[0]) / "loopus-tiny"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with room_for(100), pytest.raises(OSError, match=r"out\.json") as caught:
        write_text(file, "x" * 1000)
    assert caught.value.errno == errno.EFBIG and "was not written" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    write_text(file, "first")
    with room_for(100), pytest.raises(OSError, match="was not written"):
        write_text(file, "x" * 1000)
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(KeyboardInterrupt), complete_file(file) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]
    write_text(file, "second")
    assert file.read_text() == "second"
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_links_and_devices_stay(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    write_text(link, "a")
    assert link.is_symlink() and file.read_text() == "a"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "b")
    assert os.read(reader, 10) == b"b" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(OSError, match="/dev/full") as caught:
        write_text(Path("/dev/full"), "c")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("option", ["--json", "--html", "--trajectories"])
def test_trace(tmp_path: Path, option: str) -> None:
    out = tmp_path / ("out.png" if option == "--trajectories" else "out")
    out.write_text("an earlier one")
    with room_for(1000):
        result = run("trace", TINY, "--prompt", "3+2=", "--max-tokens", 1, option, out)
    assert result.exit_code == 2, result.output
    assert f"File too large; {out} was not written" in " ".join(result.stderr.split())
    assert out.read_text() == "an earlier one" and list(tmp_path.iterdir()) == [out]


def test_analysis(tmp_path: Path) -> None:
    sample, out = tmp_path / "sample.txt", tmp_path / "report"
    sample.write_text("a+b=c; " * 40)
    arguments = ("analyze", TINY.with_name("loopus-tiny-base"), "--out", out, "--sample", sample)
    with room_for(3000):
        result = run(*arguments)
    assert result.exit_code == 2 and "was not written" in result.stderr, result.output
    assert {path.stat().st_size < 3000 for path in out.iterdir()} <= {True}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert run(*arguments, "--force").exit_code == 0


def test_results_of_an_evaluation(tmp_path: Path) -> None:
    identity = {"limit": 3}
    small = Result(identity, "swaps", "m", "s", {"swaps": {"acc": 1.0}}, {}, 1.0)
    large = replace(small, items={"swaps": [{"response": "c" * 9999}]})
    store = Store(tmp_path)
    file = store.save(small)
    with room_for(5000), pytest.raises(OSError, match=file.name):
        store.save(large)
    assert store.load("m", "swaps", identity) == small
    assert list(file.parent.iterdir()) == [file]


def test_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    aliases.add_alias("first", str(TINY))
    file = aliases.registry_file()
    with room_for(50):
        result = run("alias", "add", "second", TINY)
    assert result.exit_code == 2 and str(file) in " ".join(result.stderr.split()), result.output
    assert json.loads(file.read_text()) == {"first": str(TINY)}
    assert list(file.parent.iterdir()) == [file]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
