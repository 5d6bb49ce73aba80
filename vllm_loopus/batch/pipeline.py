"""The Ray Data LLM pipeline from checked rows to results.

Rows are prepared in Ray's map tasks (`stages.py`), and texts are decoded by vLLM's front end in the
engine's actor, because Ray's own stages for these would need an actor each. Results arrive in any
order, and a row may be answered more than once; the caller must ignore duplicates.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_loopus.batch.rows import Row
from vllm_loopus.batch.stages import FAILED, Prepare, result_of

MAX_RAY_BLOCKS = 2000
MAX_FAILED_STARTS = 1  # consecutive failed starts of an engine; by default Ray retries more often


@dataclass(frozen=True)
class Work:
    """How the engines are run.

    - `replicas`: number of engines. `ranks`: workers of each.
    - `batch_size`: rows that Ray sends to an engine, and repeats after losing a worker, together.
    - `environment`: environment variables of Ray's workers.
    """

    model: str
    tokenizer: str
    engine_args: dict[str, Any]
    replicas: int
    ranks: int
    batch_size: int
    environment: dict[str, str]


@contextmanager
def ray_running(address: str | None, work: Work) -> Iterator[None]:
    """Connects to the Ray cluster at `address` or starts a local one, and disconnects at the end.

    A local cluster has one CPU for each rank, one for preparing rows, and the GPUs that Ray finds.
    If Ray is initialised already, nothing is done.
    """
    if ray.is_initialized():
        yield
        return
    if address is not None:
        ray.init(address=address, log_to_driver=False)
    else:
        cpus = work.replicas * work.ranks + 1
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def stream(rows: Sequence[Row], work: Work) -> Iterator[tuple[int, dict[str, Any], Any, str]]:
    """Index, echo, result (None for a failed row) and error of each row, in order of completion."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = MAX_FAILED_STARTS
    items = [
        {"index": row.index, "echo": json.dumps(row.echo), "request": json.dumps(asdict(row))}
        for row in rows
    ]
    ray_blocks = min(-(-len(items) // work.batch_size), MAX_RAY_BLOCKS)
    dataset = ray.data.from_items(items, override_num_blocks=ray_blocks)
    for found in _processor(work)(dataset).iter_rows():
        echo = json.loads(found["echo"])
        error = found.get(FAILED) or ""
        result: dict[str, Any] | None = None if error else json.loads(found["result"])
        if result and result["finish_reason"] == "error":
            error = str(result["stop_reason"] or "the request failed in the engine")
            result = None
        yield int(found["index"]), echo, result, error


def _processor(work: Work) -> Any:
    on_gpus = ray.cluster_resources().get("GPU", 0) > 0
    config = vLLMEngineProcessorConfig(
        model_source=work.model,
        engine_kwargs=dict(work.engine_args),
        batch_size=work.batch_size,
        concurrency=(work.replicas, work.replicas),
        should_continue_on_error=True,
        log_engine_metrics=False,
        placement_group_config=None if on_gpus else {"bundle_per_worker": {"CPU": 1}},
        runtime_env={"env_vars": work.environment} if work.environment else None,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    trusted = bool(work.engine_args.get("trust_remote_code", False))
    return build_processor(
        config, preprocess=Prepare(work.tokenizer, trusted), postprocess=result_of
    )
