"""Shared fixtures: golden checkpoints, and engines that tests share (a start takes seconds)."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forks, quick

# Set before vLLM is imported: the engine stays in the test's process, scheduling is deterministic.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, which take 0.6 s to clear
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Small models gain nothing from a second thread, and two test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

KV_BYTES = 2**25  # of the engines of `make_llm`, `address` and `cluster`
# A `PYTHONPATH` for servers, see `forked/sitecustomize.py`; before it, that of the tests' own run.
FORKED = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).with_name("forked"))])
)
GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN_LOOPED = GOLDEN.parent / "golden_looped"
BACKBONES = ("qwen3", "llama", "phi3")


# Fixtures with a vLLM engine, or a process that imports vLLM.
ENGINES = {"make_llm", "address", "forked_processes", "in_fork", "cluster", "results", "told"}
# Fixtures of the session that start a process: the tests that share it.
SHARED = {"address": "server", "forked_processes": "forks", "in_fork": "forks"}
# Two test processes end at about the same time if the longest groups are first.
FIRST = ["forks", "tests/serving/test_early_exit.py", "server", "tests/bench/test_report.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that need an engine, and says which tests share a process: those of a module,
    and those with the same server or forks."""
    places = []
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if ENGINES.intersection(fixtures):
            item.add_marker("engine")
        if "browser" in fixtures:
            item.add_marker("slow")
        module, _, _ = item.nodeid.partition("::")
        group = next((SHARED[name] for name in fixtures if name in SHARED), module)
        item.add_marker(pytest.mark.xdist_group(group))
        places.append(FIRST.index(group) if group in FIRST else len(FIRST))
    order = sorted(range(len(items)), key=places.__getitem__)
    items[:] = [items[place] for place in order]


@pytest.fixture(scope="session", autouse=True)
def standard_streams_of_a_cli_runner_have_descriptors() -> Iterator[None]:
    """vLLM up to 0.29 asks `sys.stdout` for its descriptor, which a runner's own stream lacks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "typer.testing._NamedTextIOWrapper.fileno",
            lambda self: 2 if "err" in self.name else 1,
        )
        yield


def golden_cases(backbone: str) -> list[dict[str, Any]]:
    """The original implementation's answers for one backbone."""
    expected = json.loads((GOLDEN / backbone / "expected.json").read_text())
    cases: list[dict[str, Any]] = expected["cases"]
    return cases


def fixed_depth_cases(backbone: str, max_loops: int) -> list[dict[str, Any]]:
    """Golden cases that never leave early, at one recursion budget."""
    return [
        case
        for case in golden_cases(backbone)
        if case["halting_strategy"] == "threshold"
        and case["q_threshold"] == 2.0
        and case["N"] == max_loops
    ]


def counter(llm: Any, name: str) -> int:
    """The value of one of vLLM's counters."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def kv_manager(llm: Any) -> Any:
    """The scheduler's `DepthKVCacheManager`."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager


def runner_of(llm: Any) -> Any:
    """vLLM's model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def admit_too_many(llm: Any) -> None:
    """From now on the scheduler expects sequences to stay at depth 1 and to grow by nothing, so
    that it has to preempt."""
    from vllm_loopus.serving.core.demand import Demand

    class Shallow(Demand):
        def observe(self, budget: int, planes: float, new_tokens: int) -> None:
            pass

        def planes(self, budget: int) -> float:
            return 1.0

    kv_manager(llm).demand = Shallow()


def spy_on_steps(llm: Any) -> list[Any]:
    """A list that gets the `LoopStats` of every step from now on."""
    sequences = runner_of(llm)._sequences
    original, seen = sequences.finish, []

    def finish() -> Any:
        progress = original()
        seen.append(progress.stats)
        return progress

    sequences.finish = finish
    return seen


@pytest.fixture(autouse=True, scope="session")
def _isolated_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Aliases of the person who runs the tests must not matter, nor be changed."""
    home = tmp_path_factory.mktemp("home")
    os.environ["XDG_CONFIG_HOME"] = str(home / "config")
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    # Here vLLM notes what it found in a model's class, for the next process.
    run = tmp_path_factory.getbasetemp()
    shared = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    os.environ["VLLM_CACHE_ROOT"] = str(shared / "vllm")
    os.environ.pop("VLLM_MODEL_REDIRECT_PATH", None)


@pytest.fixture(scope="session")
def quick_starts() -> None:
    quick.starts()


@pytest.fixture(scope="session")
def in_fork() -> Callable[..., Any]:
    return forks.in_fork


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's processes are forks of one that has imported vLLM: a second's start, not ten.

    `tests/test_plugin.py` starts them as vLLM does.
    """
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine import coordinator, utils
    from vllm.v1.executor import multiproc_executor

    cleanup_dist_env_and_memory()  # of an engine in this process
    for module in (coordinator, utils, multiproc_executor):
        monkeypatch.setattr(module, "get_mp_context", forks.context)


@pytest.fixture(scope="module")
def make_llm(quick_starts: None) -> Iterator[Callable[..., Any]]:
    """`make_llm(model, **engine_args)`: one engine at a time, shut down before the next."""
    from vllm import LLM

    current: list[Any] = []

    def shut_down() -> None:
        while current:
            current.pop().llm_engine.engine_core.shutdown()
        gc.collect()

    def make(model: str | Path, **engine_args: Any) -> Any:
        shut_down()
        options = {
            "dtype": "float32",
            "max_model_len": 128,
            "block_size": 32,
            "kv_cache_memory_bytes": KV_BYTES,
            **engine_args,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # whole GiB; it would win
            current.append(LLM(str(model), **options))
        return current[-1]

    yield make
    shut_down()
