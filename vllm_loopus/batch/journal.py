"""What is done of a batch, beside its output: `OUTPUT.partial`.

A line for each answered row, appended as answers come; the first line says what the journal belongs
to. A line that was cut off when the process was killed is dropped. At the end the output is written
in the order of the input and renamed into its place, and the journal goes.
"""

import fcntl
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_loopus.files import complete_file

FORMAT = 1
SUFFIX = ".partial"


class JournalError(OSError):
    """The journal or the output cannot be written, a full disk for example; names the file. What
    the journal holds stays."""


class Journal:
    """Use as a context manager; one process at a time has it."""

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool = False) -> None:
        """Opens the journal of `output`, or begins one; with `restart` it forgets what is there.

        Raises `ValueError` when there is one of other work, or another process has it, and
        `JournalError` when its first line cannot be written.
        """
        self.output, self.file = output, output.with_name(output.name + SUFFIX)
        self._places: dict[int, tuple[int, int]] = {}  # index -> offset and length
        self.failed = 0
        try:
            # Without a buffer: what could not be written is not tried again when it is closed.
            self._lines = io.FileIO(self.file, "a+")
        except OSError as error:
            raise ValueError(f"{self.file} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lines.close()
            raise ValueError(f"{self.file} is in use by another run; wait for it") from error
        try:
            if restart:
                self._lines.truncate(0)
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
        """Keeps the answer of a row; False, and nothing kept, if the row has one already. Raises
        `JournalError`."""
        if index in self._places:
            return False
        self._append(index, {"index": index, "answer": answer})
        self.failed += answer["error"] is not None
        return True

    def sync(self) -> None:
        """What was added is on the disk when this returns. Raises `JournalError`."""
        with _naming(self.file):
            os.fsync(self._lines.fileno())

    def finish(self, rows: int) -> None:
        """Writes the output: `rows` lines, in order. Raises `RuntimeError` when one is missing, and
        `JournalError`."""
        missing = [index for index in range(rows) if index not in self._places]
        if missing or len(self) != rows:
            raise RuntimeError(f"{len(missing)} of {rows} rows have no answer: {missing[:10]}")
        self.sync()
        try:
            self._write(rows)
        except OSError as error:  # which names the output
            raise JournalError(error.strerror or str(error)) from error
        self.file.unlink()

    def _write(self, rows: int) -> None:
        with complete_file(self.output) as unfinished, unfinished.open("wb") as output:
            for index in range(rows):
                offset, length = self._places[index]
                answer = json.loads(os.pread(self._lines.fileno(), length, offset))["answer"]
                output.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            output.flush()
            os.fsync(output.fileno())

    def _read(self, identity: dict[str, Any]) -> None:
        self._lines.seek(0)
        offset, first = 0, True
        with open(self._lines.fileno(), "rb", closefd=False) as lines:
            for line in lines:
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
        with _naming(self.file):
            try:
                left = memoryview(line)
                while left:  # written outlives the process; `sync` lets it outlive the machine
                    left = left[self._lines.write(left) :]
            except OSError:
                with suppress(OSError):
                    self._lines.truncate(offset)
                raise
        if index is not None:
            self._places[index] = offset, len(line)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"{file} cannot be written: {error.strerror or error}") from error


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def _differing(entry: dict[str, Any] | None, identity: dict[str, Any]) -> str:
    names = [name for name in identity if (entry or {}).get(name) != identity[name]]
    return ", ".join(names) or "run"
