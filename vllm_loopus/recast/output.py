"""An output folder that appears when it is complete, or not at all."""

import json
import os
import shutil
import signal
import tempfile
import threading
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
        if not _is_looped(out) and any(out.iterdir()):
            raise FileExistsError(
                f"out={out} holds something else than a LoopUS checkpoint; --force replaces "
                "nothing else: choose another folder"
            )
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"out={out} cannot be written: {error.strerror}") from error
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

    A folder `out` that is there already is replaced then, and kept after an error.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        # Not the scratch folder itself, which is for its owner only.
        unfinished, replaced = scratch / "new" / out.name, scratch / "old" / out.name
        unfinished.mkdir(parents=True)
        replaced.parent.mkdir()
        with _stopped_by_exception():
            yield unfinished
            try:
                if os.path.lexists(out):
                    out.rename(replaced)
                unfinished.rename(out)
            except BaseException:
                if os.path.lexists(replaced) and not os.path.lexists(out):
                    replaced.rename(out)
                raise
    except OSError as error:
        told = f"{error.strerror or error}; nothing was written to {out}"
        raise OSError(error.errno, told, error.filename) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_looped(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in ("loopus", "lds")


@contextmanager
def _stopped_by_exception() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process by an exception, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
