"""The work itself: a Ray Data LLM pipeline from checked rows to results.

Chat templates are applied and texts decoded outside the engine's step, by Ray's map tasks and by
vLLM's front end in the engine's actor: Ray's own stages for that want an actor each. Results come
in any order, and a row once for all Ray knows; who reads them leaves out what it has.
"""

import json
import logging
from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_loopus.batch.rows import Row
from vllm_loopus.serving.frontend.request_stats import exit_depths_in

FAILED = "__inference_error__"  # Ray's column: why the row failed, or nothing
MOST_BLOCKS = 2000
MOST_FAILED_STARTS = 1  # of an engine in a row; Ray would try some more, in vain mostly


@dataclass(frozen=True)
class Work:
    """How the engine is run.

    - `replicas`: engines; `ranks`: of each; `batch_size`: rows that Ray hands over, and would
      repeat after a lost worker, together.
    - `environment`: variables for Ray's workers.
    """

    model: str
    tokenizer: str
    engine_args: dict[str, Any]
    replicas: int
    ranks: int
    batch_size: int
    environment: dict[str, str]


class Arguments(UserDict[str, Any]):
    """Arguments of `SamplingParams`, not a dict: to a column of dicts Arrow would give every row
    the keys of all, None where a row has not said anything."""


class Prepare:
    """From a checked row, as JSON, to what the engine's stage takes."""

    def __init__(self, tokenizer: str, trust_remote_code: bool) -> None:
        self._tokenizer = tokenizer, trust_remote_code

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        request = json.loads(row["request"])
        prepared = {FAILED: "", "sampling_params": Arguments(_whole_keys(request))}
        if isinstance(request["prompt"], str):
            return {**prepared, "prompt": request["prompt"]}
        if request["prompt"] is not None:
            return {**prepared, "tokenized_prompt": request["prompt"]}
        try:
            token_ids = _tokenizer(*self._tokenizer).apply_chat_template(
                request["messages"], tokenize=True, return_dict=False, **request["template"]
            )
        except Exception as error:  # templates are code of the model's, and raise what they like
            return {FAILED: f"the chat template refused the messages: {error}"}
        return {**prepared, "tokenized_prompt": list(token_ids)}


def result_of(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row that the engine has answered."""
    metrics = row["metrics"] or {}
    result = {
        "text": row["generated_text"],
        "tokens": [int(token) for token in row["generated_tokens"]],
        "prompt_tokens": int(row["num_input_tokens"]),
        "exit_depths": [int(depth) for depth in exit_depths_in(metrics)],
        "finish_reason": metrics["finish_reason"],
        "stop_reason": metrics["stop_reason"],
    }
    return {"index": row["index"], "echo": row["echo"], "result": json.dumps(result)}


@contextmanager
def ray_running(address: str | None, work: Work) -> Iterator[None]:
    """Joins the cluster at `address`, or starts one on this machine, of a CPU for each rank and one
    for preparing rows, GPUs as Ray finds them; leaves it at the end. One joined before is kept."""
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
    """Index, echo, result (None for a failed row) and error of each row, as they come."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = MOST_FAILED_STARTS
    items = [
        {"index": row.index, "echo": json.dumps(row.echo), "request": json.dumps(asdict(row))}
        for row in rows
    ]
    blocks = min(-(-len(items) // work.batch_size), MOST_BLOCKS)
    dataset = ray.data.from_items(items, override_num_blocks=blocks)
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


def _whole_keys(request: dict[str, Any]) -> dict[str, Any]:
    """JSON has made texts of the token ids of a bias."""
    params = dict(request["sampling_params"])
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): v for token, v in params["logit_bias"].items()}
    return params


@lru_cache(maxsize=1)
def _tokenizer(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
