"""The file of results: lines of JSON, each written as soon as it is known.

`{"measure": NAME, "values": {...}}` is what a measure found; it may say several. `{"measure": NAME,
"status": ...}` is how it ended: `passed`, `failed`, `timeout`, or `skipped` where no time was left.
`{"call": ...}` begins what one call of the runner adds.
"""

import json
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Line = dict[str, Any]
PASSED, FAILED, TIMEOUT, SKIPPED = "passed", "failed", "timeout", "skipped"


def append(file: Path, line: Line) -> None:
    """Adds a line, dated where it is not, whole: measures that run at once share the file."""
    dated = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}
    text = (json.dumps(dated) + "\n").encode()
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


def read(file: Path) -> list[Line]:
    """The lines of a file, none where it is missing; a last line that was cut off is left out.

    Raises `ValueError` that names the file and the line for anything else.
    """
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    found: list[Line] = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            if number == len(lines) and not text.endswith("\n"):
                break
            raise ValueError(f"{file}, line {number}: not a line of results; name another file")
        found.append(line)
    return found


def mend(file: Path) -> None:
    """Takes away a last line that was cut off, before others are added."""
    if file.exists() and (text := file.read_bytes()) and not text.endswith(b"\n"):
        os.truncate(file, text.rfind(b"\n") + 1)


def merged(parts: Iterable[Sequence[Line]]) -> list[Line]:
    """The lines of several files, each once, in the order in which they were written."""
    every = {json.dumps(line, sort_keys=True): line for lines in parts for line in lines}
    return sorted(every.values(), key=lambda line: str(line.get("at")))


def check_same(lines: Iterable[Line], machine: Line, tiny: bool) -> None:
    """Raises `ValueError` where lines are of another machine, or of a dry run and this is none."""
    for line in lines:
        if "call" in line and (line["tiny"], line["machine"]["gpus"]) != (tiny, machine["gpus"]):
            raise ValueError(
                "earlier results are of another machine, or of --tiny; name another --out"
            )


def endings(lines: Iterable[Line]) -> dict[str, str]:
    """How each measure ended the last time."""
    return {line["measure"]: line["status"] for line in lines if "status" in line}


def values(lines: Iterable[Line], measure: str) -> list[Line]:
    """What a measure found, the newest first."""
    found = [line["values"] for line in lines if line.get("measure") == measure if "values" in line]
    return found[::-1]
