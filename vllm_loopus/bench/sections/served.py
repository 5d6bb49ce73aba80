"""Latency under load: `vllm bench serve` as an outside client, early exit off and on."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from vllm_loopus.bench.fleet import ENVIRONMENT
from vllm_loopus.bench.server import running_server, vllm_command
from vllm_loopus.bench.setup import Setup

NAME = "benchmark"
PROMPT = 16  # tokens
LOAD = 0.7  # of the requests a second that early exit off can serve
METRICS = ("ttft", "tpot", "itl", "e2el")
WARM_UPS = 2  # requests
PERCENTILES = (50, 90, 99)


def measure(setup: Setup, looped: Path, threshold: float, off_rate: float) -> dict[str, Any]:
    """`off_rate`: tokens a second of an engine with early exit off, as busy as can be; the requests
    come at a share of what that can do, the same with early exit on."""
    plan = setup.plan
    rows = plan.served_answer + PROMPT / 2  # a prompt's rows are cheaper than passes of single rows
    request_rate = LOAD * off_rate / rows
    knobs: dict[str, dict[str, Any]] = {
        "off": {"min_loops": plan.model.max_loops},
        "on": {"exit_threshold": threshold},
    }
    arguments = [
        *("--model", str(looped), "--served-model-name", NAME, "--dtype", setup.dtype),
        *("--max-num-seqs", str(max(plan.seqs)), "--max-model-len", "512"),
    ]
    results = {}
    with (
        (setup.folder / "server.log").open("w") as log,
        running_server(
            *arguments, environment={**os.environ, **ENVIRONMENT}, output=log
        ) as address,
    ):
        for state, chosen in knobs.items():
            results[state] = _client(setup, address, looped, state, chosen, request_rate)
    return {
        "requests": plan.served_requests,
        "prompt": PROMPT,
        "answer": plan.served_answer,
        "request_rate": request_rate,
        "knobs": knobs,
        **results,
    }


def _client(
    setup: Setup, address: str, looped: Path, state: str, knobs: dict[str, Any], rate: float
) -> dict[str, Any]:
    file = setup.folder / f"served-{state}.json"
    command = [
        *(vllm_command(), "bench", "serve", "--backend", "openai", "--base-url", address),
        *("--model", NAME, "--tokenizer", str(looped), "--dataset-name", "random"),
        *("--random-input-len", str(PROMPT), "--random-output-len", str(setup.plan.served_answer)),
        *("--num-prompts", str(setup.plan.served_requests), "--ignore-eos"),
        *("--request-rate", f"{rate:.4f}"),
        *("--extra-body", json.dumps({"vllm_xargs": knobs}), "--seed", str(setup.plan.seed)),
        *("--num-warmups", str(WARM_UPS), "--disable-tqdm"),
        *("--percentile-metrics", ",".join(METRICS)),
        *("--metric-percentiles", ",".join(map(str, PERCENTILES))),
        *("--save-result", "--result-dir", str(file.parent), "--result-filename", file.name),
    ]
    log = setup.folder / f"client-{state}.log"
    with log.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=output, env={**os.environ, **ENVIRONMENT}, check=False
        )
    if done.returncode or not file.exists():
        raise RuntimeError(f"vllm bench serve failed:\n{log.read_text()[-3000:]}")
    result = json.loads(file.read_text())
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} requests of vllm bench serve failed, see {log}")
    return {
        "completed": result["completed"],
        "tokens_a_second": result["output_throughput"],
        "ms": {
            metric: {f"p{p}": result[f"p{p}_{metric}_ms"] for p in PERCENTILES}
            for metric in METRICS
        },
    }
