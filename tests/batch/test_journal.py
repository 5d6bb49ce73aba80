"""What is done of a batch survives its process, and is there once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vllm_loopus.batch.journal import Journal
from vllm_loopus.batch.run import check_files, model_named, passed_on

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
    with pytest.raises(ValueError, match="is no file"):
        check_files(source, out, False, False)
    source.write_text("not json\n" + json.dumps({"body": {"model": "m"}}))
    assert model_named(source) == "m"
    with pytest.raises(ValueError, match="is the input"):
        check_files(source, source, True, False)
    with pytest.raises(ValueError, match="cannot be written"):
        check_files(source, tmp_path / "no" / "out", False, False)
    out.write_text("")
    with pytest.raises(ValueError, match="exists; name another file or give --force"):
        check_files(source, out, False, False)
    Path(f"{out}.partial").write_text("x")
    check_files(source, out, True, True)
    assert not Path(f"{out}.partial").exists() and out.exists()


def test_no_keys_are_passed_on() -> None:
    given = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_API_KEY": "s", "HF_TOKEN": "s", "PATH": "/bin"}
    assert passed_on(given) == {"VLLM_LOGGING_LEVEL": "INFO"}
