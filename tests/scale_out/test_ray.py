"""Batches, Ray Serve and vLLM's Ray executor on a Ray of this machine that all tests here share:
golden answers, also after a batch and its worker were killed."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from tests.conftest import FORKED, GOLDEN, KV_BYTES
from tests.serving.test_early_exit import MIXED, assert_golden, by_rule, generate, start
from tests.serving.test_executors import heads_of_rank
from vllm_loopus.bench.server import free_port

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'vllm-loopus[ray]'")

BACKBONE, RULE = MIXED[0]
CASES = by_rule(BACKBONE)[RULE]
ENGINE = {
    "dtype": "float32",
    "max_model_len": 128,
    "block_size": 32,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": KV_BYTES,
    "hf_overrides": {
        "halting_strategy": RULE[0],
        "exit_interval": RULE[1],
        "convergence_epsilon": RULE[2],
    },
}
PATIENCE = 900  # seconds that a start may take on a machine with other work
TIMES = 6  # each case, so that there is a middle to kill in


@pytest.fixture(scope="module")
def cluster(quick_starts: None) -> Iterator[dict[str, str]]:
    """The environment of commands that join it."""
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = str(PATIENCE)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", FORKED)
    patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it would win over the bytes
    context = ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False)
    try:
        environment = {
            **os.environ,
            "RAY_ADDRESS": context.address_info["address"],
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        yield environment
    finally:
        ray.shutdown()
        patch.undo()


def wait_for(holds: Callable[[], Any], run: subprocess.Popen[bytes] | None = None) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (result := holds()):
        assert run is None or run.poll() is None, f"it ended first, with {run.returncode}"
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
    return result


def engines() -> list[psutil.Process]:
    """Actors of Ray's with an engine in them."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if "vLLMEngineStageUDF" in " ".join(process.info["cmdline"] or ())
    ]


def batch_rows(times: int) -> list[dict[str, Any]]:
    """Every golden case `times` times, and at place 7 a row that cannot be answered."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": case["prompt"],
            "temperature": 0,
            "max_tokens": len(case["tokens"]),
            "ignore_eos": True,
            "max_loops": case["N"],
            "exit_threshold": case["q_threshold"],
            "custom_id": f"{place}",
        }
        for place, case in enumerate(CASES * times)
    ]
    rows.insert(7, {"prompt": [1] * 128, "custom_id": "too long"})
    return rows


@dataclass(frozen=True)
class Batch:
    """`vllm-loopus batch` over a file of `rows` in `folder`."""

    folder: Path
    rows: list[dict[str, Any]]
    environment: dict[str, str]

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def partial(self) -> Path:
        return self.folder / "out.jsonl.partial"

    def done(self) -> int:
        """Rows with an answer on the disk."""
        return self.partial.read_bytes().count(b"\n") - 1 if self.partial.exists() else 0

    def arguments(self) -> list[str]:
        """Of the command; writes its input."""
        source = self.folder / "in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return [
            *("batch", str(source), str(self.output)),
            *("--model", str(GOLDEN / BACKBONE), "--engine-args", json.dumps(ENGINE)),
            *("--batch-size", "2", "--json"),
        ]

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "vllm_loopus.cli", *self.arguments()],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self, run: subprocess.Popen[bytes]) -> dict[str, Any]:
        with run:
            try:
                printed, log = run.communicate(timeout=PATIENCE)
            finally:
                run.kill()
        return self.check(run.returncode, printed.decode(), log.decode())

    def check(self, code: int, printed: str, log: str) -> dict[str, Any]:
        """Every row is answered once, in order, with the golden tokens and depths, and the row that
        cannot be with its error; returns the summary."""
        assert code == 1, log[-3000:]  # one failed
        summary: dict[str, Any] = json.loads(printed)
        assert (summary["rows"], summary["failed"]) == (len(self.rows), 1)
        answers = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert [a["custom_id"] for a in answers] == [row["custom_id"] for row in self.rows]
        failed = answers.pop(7)
        assert "length 128" in failed["error"]["message"]
        times = len(answers) // len(CASES)
        for answer, case in zip(answers, CASES * times, strict=True):
            assert (answer["token_ids"], answer["exit_depths"]) == (case["tokens"], case["depths"])
        assert not self.partial.exists()
        return summary


@pytest.mark.ray
@pytest.mark.timeout(3 * PATIENCE)
def test_batch(cluster: dict[str, str], tmp_path: Path) -> None:
    from vllm_loopus.cli.main import app

    batch = Batch(tmp_path, batch_rows(1), cluster)
    done = CliRunner().invoke(app, batch.arguments())
    assert batch.check(done.exit_code, done.stdout, done.stderr)["resumed"] == 0


@pytest.mark.faults
@pytest.mark.timeout(3 * PATIENCE)
def test_batch_survives_its_own_death_and_a_workers(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """Killed in the middle and started again; then its engine is killed."""
    batch = Batch(tmp_path, batch_rows(TIMES), cluster)
    with batch.start() as first:
        try:
            wait_for(lambda: batch.done() > 10, first)
        finally:
            first.kill()
        first.communicate()
    before = batch.done()
    assert 10 < before < len(batch.rows) and not batch.output.exists()

    second = batch.start()
    try:
        wait_for(lambda: batch.done() > before, second)
        (engine,) = engines()
        assert batch.done() < len(batch.rows)
        os.kill(engine.pid, signal.SIGKILL)
    except BaseException:
        second.kill()
        raise
    assert 10 < batch.finish(second)["resumed"] <= before


@pytest.mark.ray
def test_two_ranks_on_ray(
    cluster: dict[str, str], make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = start(make_llm, MIXED[0], distributed_executor_backend="ray", tensor_parallel_size=2)
    assert llm.collective_rpc(heads_of_rank) == [1, 1]
    assert_golden(CASES, generate(llm, CASES))
    llm.llm_engine.engine_core.shutdown()


def ask(port: int, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps({"model": "loopus-tiny", "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.ray
@pytest.mark.timeout(3 * PATIENCE)
def test_two_replicas_on_ray_serve(
    cluster: dict[str, str], tmp_path: Path, make_llm: Callable[..., Any]
) -> None:
    """What `deploy` writes is run as it says; answers and depths are a plain engine's, knobs are
    refused as in `vllm serve`, and both replicas are at work."""
    pytest.importorskip("ray.serve.llm", reason="Ray Serve LLM is not installed")
    from click.testing import CliRunner as ClickRunner
    from ray import serve
    from ray.serve.scripts import cli as serve_command
    from vllm import SamplingParams

    from vllm_loopus import exit_depths
    from vllm_loopus.cli.main import app
    from vllm_loopus.deploy.app import APP

    port = free_port()
    engine = {
        "max_model_len": 128,
        "dtype": "float32",
        "block_size": 32,
        "kv_cache_memory_bytes": KV_BYTES,
        "enforce_eager": True,
    }
    options = [
        *("--replicas", "2", "--out", str(tmp_path), "--device", "cpu", "--cpus", "0.5"),
        *("--port", str(port), "--engine-args", json.dumps(engine)),
    ]
    written = CliRunner().invoke(app, ["deploy", "loopus-tiny", *options])
    assert written.exit_code == 0, written.output
    knobs = {"max_loops": 4, "exit_threshold": 0.9}
    questions = [f"{a}+{b}*2=" for a in range(3) for b in range(3)]
    body = {"max_tokens": 4, "vllm_xargs": {**knobs, "return_exit_depths": 1}}

    def healthy() -> bool:
        try:
            return ask(port, "/v1/completions", {"prompt": "1+1=", **body})[0] == 200
        except (OSError, ValueError):  # not there yet, or Serve's own pages
            return False

    # `serve run APP`, in this process, which is connected to Ray and has imported vLLM.
    started = ClickRunner().invoke(serve_command, ["run", "--non-blocking", str(tmp_path / APP)])
    try:
        assert started.exit_code == 0, started.output
        wait_for(healthy)
        with ThreadPoolExecutor(9) as pool:
            answers = list(
                pool.map(lambda q: ask(port, "/v1/completions", {"prompt": q, **body}), questions)
            )
        refused = ask(port, "/v1/completions", {"prompt": "1+1=", "vllm_xargs": {"max_loop": 2}})
        chat = ask(
            port,
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": questions[0]}], **body},
        )
        replicas = [
            actor
            for process in psutil.process_iter(["cmdline"])
            for actor in process.info["cmdline"] or ()
            if "ServeReplica" in actor and "LLMServer" in actor
        ]
    finally:
        serve.shutdown()
    assert len(replicas) == 2
    assert refused[0] == 400 and "did you mean max_loops?" in json.dumps(refused[1])
    assert chat[0] == 200 and chat[1]["choices"][0]["exit_depths"]
    llm = make_llm("loopus-tiny", **engine)
    params = SamplingParams(temperature=0, max_tokens=4, extra_args=knobs)
    for (status, answer), output_ in zip(answers, llm.generate(questions, params), strict=True):
        assert status == 200
        (choice,) = answer["choices"]
        assert choice["text"] == output_.outputs[0].text
        assert choice["exit_depths"] == exit_depths(output_)
