"""Plans an evaluation, checks it, and measures the results that are not stored yet."""

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import groupby
from typing import Any

import lm_eval
import torch

from vllm_loopus import __version__
from vllm_loopus.evaluation.columns import expand
from vllm_loopus.evaluation.engines import VLLM, EngineOptions, running_engine
from vllm_loopus.evaluation.models import Model, Setting
from vllm_loopus.evaluation.scores import items_of
from vllm_loopus.evaluation.store import Result, Store
from vllm_loopus.evaluation.tasks import LoadedTask, load_tasks

BOOTSTRAPS = 1000  # samples for standard errors without a formula


@dataclass(frozen=True)
class Cell:
    """One task for one model in one setting. `identity`: see `store.py`."""

    model: Model
    setting: Setting
    task: LoadedTask
    identity: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """All cells of a table, ordered by model."""

    cells: list[Cell]
    options: EngineOptions
    limit: int | None


def make_plan(
    models: list[Model],
    names: list[str],
    options: EngineOptions,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include: Any = None,
) -> Plan:
    """Loads tasks and computes fingerprints. Raises `ValueError` for invalid models or options."""
    tasks, length = expand(names)
    if not tasks:
        raise ValueError(f"tasks={','.join(names)!r} has no names; give a preset or task names")
    for model in models:
        model.tokenizer  # noqa: B018  (raises if there is none)
        if options.max_length is not None and options.max_length > model.max_length:
            raise ValueError(
                f"max_length={options.max_length} must be at most {model.max_length}, the maximum "
                f"of {model.name}"
            )
    if options.max_length is None:
        options = replace(options, max_length=length)
    loaded = load_tasks(tasks, num_fewshot, include)
    documents = {task.name: task.fingerprint(limit) for task in loaded}
    cells = []
    for model in models:
        fingerprint = model.fingerprint()
        for setting in model.settings:
            for task in loaded:
                identity = {
                    "model": fingerprint,
                    "depth": model.decides(setting),
                    "task": task.name,
                    "documents": documents[task.name],
                    "limit": limit,
                    **_options(options),
                    **_versions(options),
                }
                cells.append(Cell(model, setting, task, identity))
    return Plan(cells, options, limit)


def measure(
    plan: Plan, store: Store, *, resume: bool = True, log: Callable[[str], None] = print
) -> list[Result]:
    """The results of all cells, in order. With `resume`, results in `store` are reused."""
    results: dict[int, Result] = {}
    for index, cell in enumerate(plan.cells):
        found = store.load(cell.model.name, cell.task.name, cell.identity) if resume else None
        if found is not None:
            # The same checkpoint may have been measured under another name.
            results[index] = replace(found, model=cell.model.name, setting=cell.setting.label)
    if results:
        log(f"{len(results)} of {len(plan.cells)} results are in {store.folder} already")
    missing = [index for index in range(len(plan.cells)) if index not in results]
    done = len(results)
    for _, group in groupby(missing, lambda index: plan.cells[index].model.name):
        indices = list(group)
        model = plan.cells[indices[0]].model
        log(f"starting {plan.options.engine} with {model.name}")
        with running_engine(model, plan.options) as engine:
            for index in indices:
                cell = plan.cells[index]
                done += 1
                where = f"[{done}/{len(plan.cells)}]"
                log(f"{where} {cell.task.name}: {model.name}, {cell.setting.label}")
                results[index] = _evaluate(engine, cell, plan)
                store.save(results[index])
    return [results[index] for index in range(len(plan.cells))]


def _evaluate(engine: Any, cell: Cell, plan: Plan) -> Result:
    # lm-eval must not fork: its worker processes would copy the engine.
    os.environ["DISABLE_MULTIPROC"] = "1"
    engine.apply(cell.setting)
    before, started = engine.work(), time.monotonic()
    found = lm_eval.evaluate(
        engine,
        cell.task.found,
        limit=plan.limit,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=True,
    )
    seconds = time.monotonic() - started
    metrics = {**found["results"], **found.get("groups", {})}
    return Result(
        identity=cell.identity,
        task=cell.task.name,
        model=cell.model.name,
        setting=cell.setting.label,
        metrics={name: _plain(values) for name, values in metrics.items()},
        items=items_of(found["samples"]),
        seconds=round(seconds, 3),
        work=engine.work() - before,
        about={
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{_device()}, {os.cpu_count()} logical CPUs, {platform.system()}",
        },
    )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str | int) else float(value)
        for name, value in values.items()
        if isinstance(value, str | int | float)
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def _options(options: EngineOptions) -> dict[str, Any]:
    found = asdict(options)
    if options.engine == VLLM:
        del found["batch_size"]  # not used by vLLM
    return found


def _versions(options: EngineOptions) -> dict[str, str]:
    names = ["lm_eval", "torch", "transformers"]
    found = {name: metadata.version(name) for name in names}
    if options.engine == VLLM:
        from vllm_loopus.plugin import installed_vllm

        installed = installed_vllm()
        found["vllm"] = str(installed[1]) if installed else "none"
    return {**found, "vllm_loopus": __version__}


def quiet() -> None:
    """Hides the warnings of lm-evaluation-harness, which are mostly irrelevant."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
