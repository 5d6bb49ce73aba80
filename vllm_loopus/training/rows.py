"""Checks all rows of a JSONL file before training starts, and names the first bad line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_loopus.training.documents import ROLE, DataError


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


def problem_of(row: Any, text_field: str) -> str | None:
    """Why nothing can be learnt from a row; None if it can."""
    if not isinstance(row, Mapping):
        return f"is {json.dumps(row)[:40]}, not an object with {text_field!r}"
    if isinstance(row.get(text_field), str):
        return None
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return None
    messages = row.get("messages")
    if messages is None:
        keys = ", ".join(row) or "nothing"
        return (
            f"has neither text in {text_field!r}, nor messages, nor prompt and completion "
            f"(it has {keys})"
        )
    turns = isinstance(messages, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in messages
    )
    if not turns:
        return "has messages that are not a list of objects with role and content"
    if not any(turn["role"] == ROLE for turn in messages):
        return f"has messages with no turn of the {ROLE}, so nothing to learn"
    return None
