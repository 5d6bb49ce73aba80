"""A real `vllm serve`, started and stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

START_UP_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_command() -> str:
    """vLLM's own command line program, of this environment."""
    return str(Path(sys.executable).with_name("vllm"))


@contextmanager
def running_server(
    *arguments: str, environment: dict[str, str] | None = None, output: IO[str] | None = None
) -> Iterator[str]:
    """`vllm serve *arguments` on a free port of 127.0.0.1; yields its address, stops it after.

    Raises `RuntimeError` when it ends by itself, `TimeoutError` when it does not become healthy.
    """
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [vllm_command(), "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
        wait_until_healthy(server, address)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait_until_healthy(
    server: subprocess.Popen[bytes], address: str, seconds: float = START_UP_SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"vllm serve ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"vllm serve was not healthy after {seconds} s")
