"""The journal of a batch, `OUTPUT.partial`, which allows to continue after an interruption.

The first line identifies the work. Then one line is appended for each answered row. An incomplete
last line of a killed process is dropped. At the end the output is written in the order of the input
and the journal is deleted.
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
    """The journal or the output cannot be written, for example because the disk is full.

    The message names the file. Answers in the journal are preserved.
    """


class Journal:
    """A context manager. Only one process at a time can open a journal."""

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool = False) -> None:
        """Opens or creates the journal of `output`. With `restart`, an existing one is emptied.

        Raises `ValueError` if the journal belongs to other work or is open in another process, and
        `JournalError` if its first line cannot be written.
        """
        self.output, self.file = output, output.with_name(output.name + SUFFIX)
        self._places: dict[int, tuple[int, int]] = {}  # index -> offset and length
        self.failed = 0
        try:
            # Unbuffered, so that data that could not be written is not written again at close.
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
        """Stores the answer of a row, unless it has one already. Returns whether it was stored.

        Raises `JournalError`.
        """
        if index in self._places:
            return False
        self._append(index, {"index": index, "answer": answer})
        self.failed += answer["error"] is not None
        return True

    def sync(self) -> None:
        """Flushes all added answers to the disk. Raises `JournalError`."""
        with _naming(self.file):
            os.fsync(self._lines.fileno())

    def finish(self, rows: int) -> None:
        """Writes the output of `rows` lines in order, and deletes the journal.

        Raises `RuntimeError` if an answer is missing, and `JournalError`.
        """
        missing = [index for index in range(rows) if index not in self._places]
        if missing or len(self) != rows:
            raise RuntimeError(f"{len(missing)} of {rows} rows have no answer: {missing[:10]}")
        self.sync()
        try:
            self._write(rows)
        except OSError as error:  # the message names the output
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
                        "same as before, or --restart"
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
                while left:  # this survives a crash of the process, `sync` one of the machine
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
