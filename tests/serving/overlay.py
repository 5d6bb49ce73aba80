"""A scratch copy of the installed vLLM with diffs applied: links, but for the files they touch.

    python -m tests.serving.overlay FOLDER
    PYTHONPATH=FOLDER:. python -m pytest tests/serving/test_golden.py

runs tests with all of them; the installed vLLM stays as it is.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

PATCHES = Path(__file__).parents[2] / "patches"


def diffs() -> list[Path]:
    return sorted(PATCHES.glob("*.diff"))


def touched(diff: Path) -> list[str]:
    """The files that a diff changes, relative to the folder that holds the package."""
    lines = diff.read_text().splitlines()
    return [line.removeprefix("--- a/") for line in lines if line.startswith("--- a/")]


def copy_touched(diff: Path, to: Path) -> None:
    """Copies of the installed files that a diff changes."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    for name in touched(diff):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).unlink(missing_ok=True)
        shutil.copyfile(Path(spec.origin).parents[1] / name, to / name)


def build(folder: Path, applied: Iterable[Path]) -> Path:
    """`folder`, to be put first on the path."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, folder / "vllm", copy_function=os.symlink)
    for diff in (applied := list(applied)):
        copy_touched(diff, folder)
    for diff in applied:
        apply(diff, folder)
    return folder


def apply(diff: Path, folder: Path, *options: str) -> None:
    """Raises `AssertionError` with what git says when it does not apply."""
    # Not as part of a repository around the folder, whose paths git would look for.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(diff)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{diff.name}: {done.stderr}"


if __name__ == "__main__":
    build(Path(sys.argv[1]), diffs())
