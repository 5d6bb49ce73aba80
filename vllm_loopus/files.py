"""Files: atomic writing, where a file is replaced only when the new one is complete; and JSON that
may be missing."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def complete_file(file: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, which replaces `file` at the end.

    After an error the temporary file is deleted and an existing `file` is unchanged. If `file` is
    not a regular file (a device, a pipe), it is written to directly. Raises `OSError` that names
    `file`, for example if the disk is full.
    """
    try:
        if file.exists() and not file.is_file():
            yield file
            return
        target = file.resolve()  # a symbolic link is preserved
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            unfinished = scratch / target.name
            yield unfinished
            os.replace(unfinished, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        message = f"{error.strerror or error}; {file} was not written"
        raise OSError(error.errno, message, str(file)) from error


def write_text(file: Path, text: str) -> None:
    """Like `Path.write_text`, but atomic. Raises `OSError` that names `file`."""
    with complete_file(file) as unfinished:
        unfinished.write_text(text)


def object_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
