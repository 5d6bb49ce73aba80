"""What the scripts of `benchmarks/` share, and that each says which question it answers."""

import ast
import json
import sys
from pathlib import Path

import pytest

from vllm_loopus.bench.script import begin, finish, script_parser

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(file for file in FOLDER.glob("*.py") if "__main__" in file.read_text())


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_script_begins_with_its_question_and_its_command(file: Path) -> None:
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text is not None and "?" in text.splitlines()[0]
    assert f"    python benchmarks/{file.name}" in text
    assert f"`{file.name}`" in (FOLDER / "README.md").read_text()


def test_a_report_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/one.py", "--write", str(file)])
    args = script_parser("What is one?").parse_args()
    report = begin()
    head = capsys.readouterr().out
    assert all(report[name] in head for name in ("date", "machine", "command"))
    assert report["command"] == f"python benchmarks/one.py --write {file}"
    finish({**report, "one": 1}, args.write)
    assert json.loads(file.read_text()) == {**report, "one": 1}
    finish(report, None)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path, tmp_path / "missing" / "out.json"):
        with pytest.raises(SystemExit, match="2"):
            script_parser("").parse_args(["--write", str(place)])
        assert f"{place} is not a file in an existing folder" in capsys.readouterr().err
