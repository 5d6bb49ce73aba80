"""What is done of a batch, beside its output: `OUTPUT.partial`.

A line for each answered row, appended as answers come; the first line says what the journal belongs
to. A line that was cut off when the process was killed is dropped. At the end the output is written
in the order of the input and renamed into its place, and the journal goes.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from vllm_loopus.files import complete_file

FORMAT = 1
SUFFIX = ".partial"


class Journal:
    """Use as a context manager; one process at a time has it."""

    def __init__(self, output: Path, identity: dict[str, Any]) -> None:
        """Opens the journal of `output`, or begins one.

        Raises `ValueError` when there is one of other work, or another process has it.
        """
        self.output, self.file = output, output.with_name(output.name + SUFFIX)
        self._places: dict[int, tuple[int, int]] = {}  # index -> offset and length
        self.failed = 0
        try:
            self._lines: BinaryIO = self.file.open("a+b")
        except OSError as error:
            raise ValueError(f"{self.file} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lines.close()
            raise ValueError(f"{self.file} is in use by another run; wait for it") from error
        try:
            self._read(json.loads(json.dumps({"format": FORMAT, **identity})))
        except BaseException:
            self._lines.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, index: int, answer: dict[str, Any]) -> bool:
        """Keeps the answer of a row; False, and nothing kept, if the row has one already."""
        if index in self._places:
            return False
        self._append(index, {"index": index, "answer": answer})
        self.failed += answer["error"] is not None
        return True

    def sync(self) -> None:
        """What was added is on the disk when this returns."""
        os.fsync(self._lines.fileno())

    def finish(self, rows: int) -> None:
        """Writes the output: `rows` lines, in order. Raises `RuntimeError` when one is missing."""
        missing = [index for index in range(rows) if index not in self._places]
        if missing or len(self) != rows:
            raise RuntimeError(f"{len(missing)} of {rows} rows have no answer: {missing[:10]}")
        self.sync()
        with complete_file(self.output) as unfinished, unfinished.open("wb") as output:
            for index in range(rows):
                offset, length = self._places[index]
                self._lines.seek(offset)
                answer = json.loads(self._lines.read(length))["answer"]
                output.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            output.flush()
            os.fsync(output.fileno())
        self.file.unlink()

    def _read(self, identity: dict[str, Any]) -> None:
        self._lines.seek(0)
        offset, first = 0, True
        for line in self._lines:
            if not line.endswith(b"\n"):
                break
            entry = _entry(line)
            if first and entry != identity:
                raise ValueError(
                    f"{self.file} belongs to another {_differing(entry, identity)}; give the "
                    "same again, or --restart"
                )
            if not first:
                if entry is None:
                    break
                self._places[entry["index"]] = offset, len(line)
                self.failed += entry["answer"]["error"] is not None
            offset, first = offset + len(line), False
        self._lines.truncate(offset)
        if first:
            self._append(None, identity)

    def _append(self, index: int | None, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        offset = self._lines.seek(0, os.SEEK_END)
        self._lines.write(line)
        self._lines.flush()  # outlives the process; `sync` lets it outlive the machine
        if index is not None:
            self._places[index] = offset, len(line)


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def _differing(entry: dict[str, Any] | None, identity: dict[str, Any]) -> str:
    names = [name for name in identity if (entry or {}).get(name) != identity[name]]
    return ", ".join(names) or "run"
