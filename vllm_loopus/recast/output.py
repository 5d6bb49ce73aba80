"""An output folder that appears when it is complete, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BESIDE_WEIGHTS = 8 * 2**20  # bytes of tokenizer, report and the rest


def check_output(out: Path, *, force: bool, needed: int, reads: Path | None = None) -> None:
    """Whether `needed` bytes of weights can be written to the new folder `out`, before any work.

    `reads` is the folder that the work reads from. Raises `FileExistsError` when `out` is there and
    `force` is not given, or when replacing it would delete what is read, and `OSError` when the
    device has too little space.
    """
    if os.path.lexists(out):
        if not force:
            raise FileExistsError(f"out={out} exists; choose another folder or give --force")
        if reads is not None and reads.resolve().is_relative_to(out.resolve()):
            raise FileExistsError(f"out={out} is or holds the model to read; choose another folder")
        if not out.is_dir():
            raise FileExistsError(f"out={out} is a file; choose another name")
        if not (out / "config.json").is_file() and any(out.iterdir()):
            raise FileExistsError(
                f"out={out} holds something else than a checkpoint (no config.json); --force "
                "replaces checkpoints only: choose another folder"
            )
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    needed += BESIDE_WEIGHTS
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"out={out} needs {needed / 2**20:,.0f} MiB, but its device has {free / 2**20:,.0f} "
            "MiB free; make room or choose another folder"
        )


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, renamed to `out` at the end and deleted after any error.

    A folder `out` that is there already is replaced then. Raises `OSError` as it comes, with a word
    on what was deleted.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        unfinished, replaced = scratch / out.name, scratch / "replaced" / out.name
        unfinished.mkdir()  # not the scratch folder itself: that one is for its owner only
        yield unfinished
        if os.path.lexists(out):
            replaced.parent.mkdir()
            out.rename(replaced)
        try:
            unfinished.rename(out)
        except OSError:
            if os.path.lexists(replaced):
                replaced.rename(out)
            raise
    except OSError as error:
        told = f"{error.strerror or error}; the unfinished {out} was deleted"
        raise OSError(error.errno, told, error.filename) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
