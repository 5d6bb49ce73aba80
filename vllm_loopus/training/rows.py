"""Checks all rows of a JSONL file before training starts, and names the first bad line."""

import json
from pathlib import Path

from vllm_loopus.training.documents import DataError, problem_of


def check_lines(path: Path, text_field: str) -> None:
    """Raises `DataError` with file, line (counted from 1) and reason for a row of no usable form.

    Blank lines are allowed. A file that is one JSON array is left to `datasets`.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip()[:1] == b"[":
                return
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.strip())
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8: {error}") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where} is not JSON: {error.msg} at character {error.colno}; each line is "
                    "one object"
                ) from error
            except RecursionError as error:
                raise DataError(f"{where} is nested too deeply") from error
            if (problem := problem_of(row, text_field)) is not None:
                raise DataError(f"{where} {problem}")
