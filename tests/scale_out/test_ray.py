"""Batches and Ray Serve on a Ray of this machine, shared by all tests here: golden answers, also
after the run and a worker of it were killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import GOLDEN
from tests.serving.test_early_exit import MIXED, by_rule

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'vllm-loopus[ray]'")

BACKBONE, RULE = MIXED[0]
CASES = by_rule(BACKBONE)[RULE]
ENGINE = {
    "dtype": "float32",
    "max_model_len": 128,
    "block_size": 32,
    "skip_tokenizer_init": True,
    "hf_overrides": {
        "halting_strategy": RULE[0],
        "exit_interval": RULE[1],
        "convergence_epsilon": RULE[2],
    },
}
PATIENCE = 400  # seconds that a start may take on a machine with other work
TIMES = 12  # each case, so that there is a middle to kill in


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of commands that join it."""
    context = ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        environment = {
            **os.environ,
            "RAY_ADDRESS": context.address_info["address"],
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        yield environment
    finally:
        ray.shutdown()


def wait_for(holds: Callable[[], Any], run: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (result := holds()):
        assert run.poll() is None, f"it ended first, with {run.returncode}"
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


@pytest.mark.timeout(3 * PATIENCE)
def test_batch_survives_its_own_death_and_a_workers(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    """Killed in the middle and started again; then its engine is killed: each row answered once, in
    order, with the golden tokens and depths, and the row that cannot be with its error."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {
            "prompt": case["prompt"],
            "temperature": 0,
            "max_tokens": len(case["tokens"]),
            "ignore_eos": True,
            "max_loops": case["N"],
            "exit_threshold": case["q_threshold"],
            "custom_id": f"{place}",
        }
        for place, case in enumerate(CASES * TIMES)
    ]
    rows.insert(7, {"prompt": [1] * 128, "custom_id": "too long"})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial = Path(f"{output}.partial")
    command = [
        *(sys.executable, "-m", "vllm_loopus.cli", "batch", str(source), str(output)),
        *("--model", str(GOLDEN / BACKBONE), "--engine-args", json.dumps(ENGINE)),
        *("--batch-size", "2", "--json"),
    ]

    def done() -> int:
        return partial.read_bytes().count(b"\n") - 1 if partial.exists() else 0

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    with start() as first:
        try:
            wait_for(lambda: done() > 10, first)
        finally:
            first.kill()
        first.communicate()
    before = done()
    assert 10 < before < len(rows) and not output.exists()

    with start() as second:
        try:
            wait_for(lambda: done() > before, second)
            (engine,) = engines()
            assert done() < len(rows)
            os.kill(engine.pid, signal.SIGKILL)
            told, log = second.communicate(timeout=PATIENCE)
        finally:
            second.kill()
    assert second.returncode == 1, log.decode()[-3000:]
    summary = json.loads(told)
    assert (summary["rows"], summary["failed"]) == (len(rows), 1)
    assert 10 < summary["resumed"] <= before

    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [row["custom_id"] for row in rows]
    failed = answers.pop(7)
    assert "maximum context length is 128" in failed["error"]["message"]
    for answer, case in zip(answers, CASES * TIMES, strict=True):
        assert (answer["token_ids"], answer["exit_depths"]) == (case["tokens"], case["depths"])
    assert not partial.exists()
