"""What is done of a batch survives its process, and is there once."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.room import room_for
from vllm_loopus.batch.answers import answer
from vllm_loopus.batch.journal import Journal, JournalError
from vllm_loopus.batch.run import check_files, model_named, passed_on
from vllm_loopus.cli.main import app

IDENTITY = {"input": "abc", "model": "m", "engine_args": {"a": 1}}


def ok(text: str) -> dict[str, Any]:
    return {"text": text, "error": None}


def read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def test_goes_on_and_finishes_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, IDENTITY) as journal:
        assert journal.add(2, ok("ü\u2028 c")) and not journal.add(2, ok("again"))
        assert journal.add(0, {"error": {"message": "no"}})
    with journal.file.open("ab") as torn:  # killed while it wrote
        torn.write(b'{"index": 1, "answ')
    with Journal(out, IDENTITY) as journal:
        assert (len(journal), journal.failed) == (2, 1) and 1 not in journal
        with pytest.raises(RuntimeError, match=r"1 of 3 rows have no answer: \[1\]"):
            journal.finish(3)
        assert not out.exists()
        journal.add(1, ok("b"))
        journal.finish(3)
    assert [row.get("text") for row in read(out)] == [None, "b", "ü\u2028 c"]
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_torn_before_its_first_line_was_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    Path(f"{out}.partial").write_text('{"format"')
    with Journal(out, IDENTITY) as journal:
        journal.add(0, ok("a"))
        journal.finish(1)
    assert read(out) == [ok("a")]


def test_of_other_work(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, IDENTITY) as journal:
        journal.add(0, ok("a"))
    with pytest.raises(ValueError, match=r"belongs to another input; .*--restart"):
        Journal(out, {**IDENTITY, "input": "abd"})
    with Journal(out, IDENTITY) as journal:
        assert len(journal) == 1


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, IDENTITY), pytest.raises(ValueError, match="in use by another run"):
        Journal(out, IDENTITY)


def test_files_are_checked_first(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="is not a file"):
        check_files(source, out, False)
    source.write_text("not json\n" + json.dumps({"body": {"model": "m"}}))
    assert model_named(source) == "m"
    with pytest.raises(ValueError, match="is the input"):
        check_files(source, source, True)
    with pytest.raises(ValueError, match="cannot be written"):
        check_files(source, tmp_path / "no" / "out", False)
    out.write_text("")
    with pytest.raises(ValueError, match="exists; name another file or give --force"):
        check_files(source, out, False)
    Path(f"{out}.partial").write_text("x")
    check_files(source, out, True)
    assert Path(f"{out}.partial").exists() and out.exists()


def test_restart_forgets_what_no_other_run_has(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, IDENTITY) as journal:
        journal.add(0, ok("a"))
        held = journal.file.read_bytes()
        with pytest.raises(ValueError, match="in use by another run"):
            Journal(out, {**IDENTITY, "input": "abd"}, restart=True)
        assert journal.file.read_bytes() == held
    with Journal(out, {**IDENTITY, "input": "abd"}, restart=True) as journal:
        assert len(journal) == 0
        journal.add(0, ok("b"))
    with Journal(out, {**IDENTITY, "input": "abd"}) as journal:
        assert len(journal) == 1


def batch(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"prompt": "a", "max_loops": 99}, []),
        ({"prompt": "a"}, ["--engine-args", '{"tensor_parallel_size": 0}']),
    ],
)
def test_restart_comes_after_the_checks(tmp_path: Path, row: Any, options: list[str]) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(row))
    partial = Path(f"{out}.partial")
    partial.write_text("much work")
    result = batch(source, out, "--restart", *options)
    assert result.exit_code == 2, result.output
    assert partial.read_text() == "much work"


def test_a_full_disk_is_told_and_what_is_done_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Journal(out, IDENTITY) as journal:
        journal.add(0, ok("a" * 400))
        with room_for(1000), pytest.raises(JournalError, match=r"out\.jsonl\.partial cannot be"):
            journal.add(1, ok("b" * 1000))
        assert 1 not in journal
        journal.add(2, ok("c"))  # there is room again
    with Journal(out, IDENTITY) as journal:
        assert len(journal) == 2 and 1 not in journal
        journal.add(1, ok("b"))
        with room_for(300), pytest.raises(JournalError, match=r"; .*out\.jsonl was not written"):
            journal.finish(3)
        assert not out.exists() and journal.file.exists()
        journal.finish(3)
    assert [row["text"] for row in read(out)] == ["a" * 400, "b", "c"]


def test_a_disk_that_fails_while_it_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(tmp_path / "out.jsonl", IDENTITY) as journal:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(JournalError, match=r"partial cannot be written: No space left"):
            journal.sync()


def test_the_command_says_how_to_go_on(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "a"}))
    with room_for(10):
        result = batch(source, out)
    assert result.exit_code == 2, result.output
    told = " ".join(result.stderr.split())
    assert f"{out}.partial cannot be written: File too large; free some space, then the" in told


def test_answers_in_openais_form_say_when() -> None:
    echo = {"form": "openai", "url": "/v1/completions", "custom_id": "a"}
    result = {
        "text": "b", "finish_reason": "stop", "exit_depths": [1], "prompt_tokens": 1,
        "tokens": [3], "model": "m",
    }  # fmt: skip
    body = answer(0, echo, result)["response"]["body"]
    assert isinstance(body["created"], int) and body["created"] > 1.7e9


def test_no_keys_are_passed_on() -> None:
    given = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_API_KEY": "s", "HF_TOKEN": "s", "PATH": "/bin"}
    assert passed_on(given) == {"VLLM_LOGGING_LEVEL": "INFO"}
