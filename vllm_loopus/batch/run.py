"""Runs a batch from its input file to its output file."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_loopus.batch.answers import answer, failure
from vllm_loopus.batch.journal import Journal
from vllm_loopus.batch.rows import Limits, Row, read_rows

SYNC_SECONDS = 1.0
# Engine arguments that Ray Data LLM sets itself.
NOT_HERE = ("model", "distributed_executor_backend", "disable_log_stats", "served_model_name")
PARALLEL = {  # sizes that must be 1, and the alternative
    "data_parallel_size": "give --replicas",
    "pipeline_parallel_size": "a loop cannot be split into stages; give tensor_parallel_size",
}


@dataclass(frozen=True)
class Options:
    """The options of a batch; see `vllm-loopus batch --help`."""

    model: str
    target: str
    engine_args: dict[str, Any]
    replicas: int = 1
    batch_size: int = 32
    address: str | None = None


@dataclass(frozen=True)
class Progress:
    """The progress of a batch.

    `rows`: of the input. `done`: finished rows; `failed`: those with an error; `resumed`: those of
    an earlier run. `tokens`: generated in this run; `depths`: the sum of their exit depths.
    """

    rows: int
    done: int
    failed: int
    resumed: int
    tokens: int
    depths: int


def check_files(source: Path, output: Path, force: bool) -> None:
    """Raises `ValueError` if the input cannot be read or the output cannot be written."""
    if not source.is_file():
        raise ValueError(f"{source} is not a file; give a file of JSON lines")
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise ValueError(f"{output} cannot be written; name a file in an existing folder")
    if output.exists() and output.samefile(source):
        raise ValueError(f"{output} is the input; name another file")
    if output.exists() and not force:
        raise ValueError(f"{output} exists; name another file or give --force")


def model_named(source: Path) -> str | None:
    """The first model named in the rows, if any. Invalid rows are ignored here."""
    with source.open("rb") as lines:
        return next(filter(None, map(_model_of, lines)), None)


def check_parallel_sizes(args: Mapping[str, Any]) -> None:
    """Raises `ValueError` for invalid parallel sizes, by which Ray would start its workers."""
    for name in ("tensor_parallel_size", *PARALLEL):
        size = args.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"engine_args has {name}={size!r}, which must be a whole number of 1 or more"
            )
        if name in PARALLEL and size != 1:
            raise ValueError(f"engine_args has {name}={size}, which must be 1; {PARALLEL[name]}")


def limits_of(options: Options) -> Limits:
    """The limits for requests, from the model config that vLLM creates.

    Raises `ValueError` that names invalid engine arguments.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.tokenizers import cached_tokenizer_from_config

    from vllm_loopus.serving.knobs.engine import EngineOptions

    if given := [name for name in NOT_HERE if name in options.engine_args]:
        raise ValueError(f"engine_args has {given[0]!r}, which is set by the batch; leave it out")
    check_parallel_sizes(options.engine_args)
    try:
        args = AsyncEngineArgs(model=options.target, **options.engine_args)
    except TypeError as error:
        raise ValueError(f"engine_args: {error}") from error
    config = args.create_model_config()
    tokenizer = None if config.skip_tokenizer_init else cached_tokenizer_from_config(config)
    engine_options = EngineOptions.of(options.engine_args.get("additional_config"))
    engine_options.check(config.hf_config)
    return Limits(
        model_config=config,
        served_names=tuple(dict.fromkeys((options.model, options.target))),
        options=engine_options,
        sampling_defaults=config.get_diff_sampling_param(),
        has_tokenizer=tokenizer is not None,
        has_chat_template=getattr(tokenizer, "chat_template", None) is not None,
    )


def identity(source: Path, options: Options) -> dict[str, Any]:
    """Everything that affects the answers; a journal with another identity is not continued."""
    with source.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"input": digest, "model": options.target, "engine_args": options.engine_args}


def run(
    source: Path,
    output: Path,
    options: Options,
    report: Callable[[Progress], None],
    restart: bool = False,
) -> Progress:
    """Writes the answers to all rows of `source` to `output`.

    Continues the journal of the same work if there is one, unless `restart`. `report` is called
    with the progress. Raises `ValueError` for invalid rows, options or files before an engine
    starts, and `JournalError` if the disk is full.
    """
    limits = limits_of(options)
    rows = list(read_rows(source, limits))
    if not rows:
        raise ValueError(f"{source} has no rows; give one JSON object per line")
    with Journal(output, identity(source, options), restart) as journal:
        resumed = len(journal)
        tokens = depths = 0

        def progress() -> Progress:
            return Progress(len(rows), len(journal), journal.failed, resumed, tokens, depths)

        left = [row for row in rows if row.index not in journal]
        report(progress())
        synced = time.monotonic()
        for index, echo, result, error in _results(left, limits, options) if left else ():
            if result is None:
                journal.add(index, failure(index, echo, error))
            elif journal.add(index, answer(index, echo, {**result, "model": options.model})):
                tokens += len(result["exit_depths"])
                depths += sum(result["exit_depths"])
            if time.monotonic() - synced > SYNC_SECONDS:
                journal.sync()
                synced = time.monotonic()
            report(progress())
        journal.finish(len(rows))
        return progress()


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for the workers of a running cluster: those of vLLM, except keys and
    tokens, which Ray would show."""
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith("VLLM_") and "KEY" not in name and "TOKEN" not in name)
        or name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    }


def _results(
    left: list[Row], limits: Limits, options: Options
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any] | None, str]]:
    from vllm_loopus.batch import pipeline

    args = options.engine_args
    work = pipeline.Work(
        model=options.target,
        tokenizer=limits.model_config.tokenizer,
        engine_args=args,
        replicas=options.replicas,
        ranks=args.get("tensor_parallel_size", 1),
        batch_size=options.batch_size,
        environment=passed_on(os.environ) if options.address is not None else {},
    )
    with pipeline.ray_running(options.address, work):
        yield from pipeline.stream(left, work)


def _model_of(line: bytes) -> str | None:
    try:
        row = json.loads(line)
        model = (row.get("body") or row).get("model")
    except (ValueError, AttributeError, RecursionError):
        return None
    return model if isinstance(model, str) else None
