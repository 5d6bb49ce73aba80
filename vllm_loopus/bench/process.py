"""An engine under test in a process of its own, and the parent's side of the protocol."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

WORKERS = Path(__file__).parent / "workers"
LAST_LINES = 25  # of a worker's log, shown with its failure


class WorkerError(RuntimeError):
    """A worker that failed or ended; the message holds its traceback, or the end of its log."""


class Worker:
    """A process that answers commands one at a time. It sleeps on its input in between."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log_file = log
        self._log: IO[str] = log.open("w")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._usage = psutil.Process(self._process.pid)

    def ask(self, command: str, **arguments: Any) -> None:
        """Sends a command; `answer` waits for what it returns."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, "arguments": arguments}))
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._ended()) from None

    def answer(self) -> Any:
        """Raises `WorkerError`."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer["result"]

    def call(self, command: str, **arguments: Any) -> Any:
        """`ask` and `answer`."""
        self.ask(command, **arguments)
        return self.answer()

    def cpu_seconds(self) -> float:
        """What the process has used of the CPU so far."""
        try:
            times = self._usage.cpu_times()
        except psutil.NoSuchProcess:
            raise WorkerError(self._ended()) from None
        return float(times.user + times.system)

    def end_input(self) -> None:
        """Lets the process end by itself; `close` waits for that."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def close(self) -> None:
        """Ends the process: by the end of its input, by force after that."""
        self.end_input()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _ended(self) -> str:
        code = self._process.wait()
        self._log.flush()
        lines = self._log_file.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return f"{self.name} ended with exit code {code}:\n" + "\n".join(lines)


def package_worker(module: str) -> list[str]:
    """The command of a worker that runs in this environment."""
    return [sys.executable, "-m", f"vllm_loopus.bench.workers.{module}"]


def script_worker(python: str, script: str, *arguments: str) -> list[str]:
    """The command of a worker that runs in another one, which does not have this package."""
    return [python, str(WORKERS / script), *arguments]
