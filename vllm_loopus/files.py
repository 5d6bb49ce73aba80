"""Files that appear when they are complete, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_file(file: Path) -> Iterator[Path]:
    """A path of the same name to write to, put in the place of `file` at the end and deleted after
    any error. A file that is there already is kept until then; what is no regular file (a device,
    a pipe) is written to as it is.

    Raises `OSError` naming `file`, for a full disk too.
    """
    try:
        if file.exists() and not file.is_file():
            yield file
            return
        target = file.resolve()  # a link stays one
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            unfinished = scratch / target.name
            yield unfinished
            os.replace(unfinished, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        told = f"{error.strerror or error}; {file} was not written"
        raise OSError(error.errno, told, str(file)) from error


def write_text(file: Path, text: str) -> None:
    """As `Path.write_text`, complete or not at all. Raises `OSError` naming `file`."""
    with complete_file(file) as unfinished:
        unfinished.write_text(text)
