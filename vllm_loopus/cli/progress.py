"""Progress of work in parts that may take seconds or minutes each, on standard error."""

import sys
import time

import typer

SECONDS = 5.0  # between lines


class Progress:
    """Says how far a task is, at most every five seconds, and nothing about a quick one."""

    def __init__(self, task: str) -> None:
        self.task = task
        self._last = time.monotonic()

    def __call__(self, done: str) -> None:
        now = time.monotonic()
        if now - self._last >= SECONDS:
            typer.echo(f"{self.task}: {done}", err=True)
            sys.stderr.flush()
            self._last = now
