"""Atomic writing of output folders: a folder is created only when it is complete."""

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_loopus.architectures import ARCHITECTURES
from vllm_loopus.files import object_in

BESIDE_WEIGHTS = 8 * 2**20  # bytes for the tokenizer, the report and other files


def check_output(out: Path, *, force: bool, needed: int, reads: Path | None = None) -> None:
    """Checks before any work that `needed` bytes of weights can be written to the folder `out`.

    `reads`: the folder that is read from. Raises `FileExistsError` if `out` exists and `force` is
    False, or if replacing it would delete `reads`, and `OSError` if there is not enough space.
    """
    if os.path.lexists(out):
        if not force:
            raise FileExistsError(f"out={out} exists; choose another folder or give --force")
        if reads is not None and reads.resolve().is_relative_to(out.resolve()):
            raise FileExistsError(
                f"out={out} is or contains the model to read; choose another folder"
            )
        if not out.is_dir():
            raise FileExistsError(f"out={out} is a file; choose another name")
        if not (_is_looped(out) or _is_unpacked(out)) and any(out.iterdir()):
            raise FileExistsError(
                f"out={out} is not a checkpoint that vllm-loopus wrote, and --force replaces "
                "nothing else; choose another folder"
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
    """Gives a temporary folder to write to, which becomes `out` at the end.

    After an error the temporary folder is deleted and an existing `out` is unchanged.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        # Not the scratch folder itself, which only its owner can read.
        unfinished, replaced = scratch / "new" / out.name, scratch / "old" / out.name
        unfinished.mkdir(parents=True)
        replaced.parent.mkdir()
        with _signals_as_exceptions():
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
        message = f"{error.strerror or error}; nothing was written to {out}"
        raise OSError(error.errno, message, error.filename) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_looped(folder: Path) -> bool:
    looped = {"lds", *(architecture.config_class.model_type for architecture in ARCHITECTURES)}
    return object_in(folder / "config.json").get("model_type") in looped


def _is_unpacked(folder: Path) -> bool:
    """Whether it is a plain checkpoint that was made from a GGUF file."""
    return "gguf" in object_in(folder / "provenance.json")


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise an exception, so that the process cleans up."""
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
