"""One `vllm serve loopus-tiny` for all tests that talk HTTP: a start takes half a minute."""

import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import FORKED, KV_BYTES
from vllm_loopus.bench.server import running_server

SERVED = "loopus-tiny"
MAX_LOOPS = 8
EFFORTS = {"low": 2, "medium": 4}
ARGUMENTS = (
    *("--model", SERVED, "--max-model-len", "256", "--dtype", "float32"),
    *("--kv-cache-memory-bytes", str(KV_BYTES)),
    *("--hf-overrides", json.dumps({"max_loops": MAX_LOOPS, "exit_threshold": 0.5})),
    *("--additional-config", json.dumps({"loopus": {"reasoning_effort": EFFORTS}})),
)


def scale_out() -> tuple[str, ...]:
    """The flag for rendering and for token ids in and out, which vLLM 0.29 serves without one."""
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return ("--enable-scale-out",) if hasattr(FrontendArgs, "enable_scale_out") else ()


@pytest.fixture(scope="module")
def long_answers(make_llm: Any) -> Callable[[Any], list[Any]]:
    """For a setting: answers over a block boundary, of an engine with room for all that neither
    runs ahead nor guesses."""
    from tests.serving.test_early_exit import LONG, by_rule, generate, start

    @cache
    def answers(setting: Any) -> list[Any]:
        cases = by_rule(setting[0])[setting[1]][-12:]
        return generate(start(make_llm, setting), cases, max_tokens=LONG)

    return answers


@pytest.fixture(scope="session")
def server_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="session")
def address(server_log: Path) -> Iterator[str]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_LOG_STATS_INTERVAL": "1",
        "PYTHONPATH": FORKED,
    }
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over the bytes
    environment.pop("HF_HUB_OFFLINE", None)  # a user has not set it, and nothing may be fetched
    with server_log.open("w") as output:
        try:
            with running_server(
                *ARGUMENTS, *scale_out(), environment=environment, output=output
            ) as address:
                yield address
        except RuntimeError as error:
            raise RuntimeError(server_log.read_text()[-3000:]) from error


@pytest.fixture(scope="session")
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(address + path, timeout=10) as response:
        assert response.status == 200
        return response.read().decode()


OWN_LABELS = ("le", "depth", "at")  # beside those of model and engine


def samples(address: str) -> dict[tuple[str, str], float]:
    """`/metrics` of the engine: (name, value of `le`, `depth` or `at`) -> value."""
    return {
        (
            sample.name,
            next((v for k, v in sample.labels.items() if k in OWN_LABELS), ""),
        ): sample.value
        for family in text_string_to_metric_families(get(address, "/metrics"))
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }


def wait_until(holds: Callable[[], Any], seconds: float = 20) -> Any:
    """What `holds` returns once it is true; fails when that takes too long."""
    deadline = time.monotonic() + seconds
    while not (result := holds()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.1)
    return result
