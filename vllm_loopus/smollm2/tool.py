"""Runs `vllm-loopus` commands, as a user would."""

import subprocess
import sys


class ToolError(RuntimeError):
    """A command failed; the message names it."""


def tool(*arguments: str, captured: bool = False) -> str:
    """Runs `vllm-loopus ARGUMENTS` and returns its standard output if it is `captured`.

    Raises `ToolError` if it fails.
    """
    print("$ vllm-loopus " + " ".join(arguments), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "vllm_loopus.cli", *arguments],
        check=False, stdout=subprocess.PIPE if captured else None, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ToolError(f"vllm-loopus {arguments[0]} ended with code {done.returncode}")
    return done.stdout or ""
