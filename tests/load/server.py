"""A `vllm serve` on 127.0.0.1, its processes, memory and shared memory seen from outside."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from vllm_loopus.bench.server import free_port, wait_until_healthy

MODEL = "loopus-tiny"
MAX_MODEL_LEN = 256
# Pages of the K/V pool count as memory of a process once they were written to: in a small pool that
# is soon, and what grows afterwards is something else.
POOL = 256 * 2**20
ARGUMENTS = (
    *("--max-model-len", str(MAX_MODEL_LEN), "--dtype", "float32"),
    *("--kv-cache-memory-bytes", str(POOL)),
    *("--disable-uvicorn-access-log", "--hf-overrides", '{"max_loops": 8, "exit_threshold": 0.5}'),
)
START_UP_SECONDS = 900  # on a machine that does much else
SHARED_MEMORY = re.compile(r"\s(/dev/shm/\S+)")
MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes: resident, and what would be free if it ended."""

    rss: int
    uss: int

    def __str__(self) -> str:
        return f"{self.rss / MIB:.1f} MiB RSS, {self.uss / MIB:.1f} MiB USS"


class Served:
    """A server at an address, whoever started it."""

    def __init__(self, address: str) -> None:
        self.address = address

    def health(self) -> int | None:
        """The status of `/health`, None where nobody answers."""
        return status_of(f"{self.address}/health")

    def metrics(self) -> dict[str, float]:
        """Samples of `/metrics`, summed over labels."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as response:
            text = response.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("vllm:"):
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def idle(self) -> bool:
        """Whether nothing runs, nothing waits and no block of K/V is held, by the metrics."""
        found = self.metrics()
        names = (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
        )
        return not any(found[name] for name in (*names, "vllm:loopus_kv_blocks"))


@dataclass
class Server(Served):
    """`vllm serve MODEL *arguments`; a context manager that leaves no process behind."""

    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    model: str = MODEL
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        super().__init__(f"http://127.0.0.1:{self.port}")

    def __enter__(self) -> "Server":
        self._scratch = tempfile.TemporaryDirectory(prefix="vllm-loopus-load-")
        self.log = Path(self._scratch.name) / "log"
        self._files: set[str] = set()
        self._everyone: dict[int, psutil.Process] = {}
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self.process.poll() is None:
                self.stop(signal.SIGINT)
        finally:
            for process in self.left_behind():
                process.kill()
            self._scratch.cleanup()

    def start(self) -> None:
        """Starts it, also again on the same port. Raises `RuntimeError` with its last lines."""
        vllm = Path(sys.executable).with_name("vllm")
        command = [str(vllm), "serve", self.model, *ARGUMENTS, *self.arguments]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # the demo's; it would win over `POOL`
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        try:
            wait_until_healthy(self.process, self.address, START_UP_SECONDS)
        except (RuntimeError, TimeoutError) as error:
            raise RuntimeError(f"{error}\n{self.log.read_text()[-3000:]}") from error
        self.look()

    def look(self) -> dict[str, psutil.Process]:
        """Its living processes by role: `server`, `engine`, `worker 0`, ... Remembers them and
        the shared memory that they have open."""
        found: dict[str, psutil.Process] = {}
        try:
            server = psutil.Process(self.process.pid)
            processes = [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return found
        workers = 0
        for process in processes:
            try:
                title = " ".join(process.cmdline())
                maps = Path(f"/proc/{process.pid}/maps").read_text()
            except (OSError, psutil.Error):
                continue
            self._everyone[process.pid] = process
            self._files.update(SHARED_MEMORY.findall(maps))
            if process.pid == server.pid:
                found["server"] = process
            elif "EngineCore" in title:
                found["engine"] = process
            elif "Worker" in title:
                found[f"worker {workers}"] = process
                workers += 1
        return found

    def memory(self) -> dict[str, Memory]:
        """Of each process, by role."""
        found = {}
        for role, process in self.look().items():
            info = process.memory_full_info()
            found[role] = Memory(info.rss, info.uss)
        return found

    def left_behind(self) -> list[psutil.Process]:
        """Processes seen by `look` that live on."""
        return [p for p in self._everyone.values() if p.is_running() and p.status() != "zombie"]

    def shared_memory_left(self) -> list[str]:
        """Files of shared memory seen by `look` that are still there."""
        return sorted(file for file in self._files if Path(file).exists())

    def stop(self, number: int = signal.SIGTERM, timeout: float = 90) -> int:
        """Sends the signal to the server alone and returns its exit code."""
        self.look()
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 90) -> int:
        """Its exit code. Raises `subprocess.TimeoutExpired`."""
        return self.process.wait(timeout=timeout)


def status_of(url: str) -> int | None:
    """Of a GET, None where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def wait_until(holds: Callable[[], Any], seconds: float) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
