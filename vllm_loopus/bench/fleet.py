"""Engines that are all alive and work in turn: A B C, C B A, ..., one at a time.

A machine's speed may drift by a third within minutes. So what is compared runs within seconds of
each other, again and again, and a ratio is taken within each round.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_loopus.bench.process import Worker, package_worker
from vllm_loopus.bench.workers.engine import Kind
from vllm_loopus.bench.workloads import Workload

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class EngineSpec:
    """A vLLM engine. `loopus`: our engine options; `options`: those of vLLM's `LLM`."""

    name: str
    kind: Kind
    model: Path
    loopus: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        options = {**self.options, "model": self.model.name}
        return {"kind": self.kind, "loopus": dict(self.loopus), "options": options}


@dataclass(frozen=True)
class Cell:
    """One thing that is timed: a workload on an engine."""

    name: str
    engine: str
    workload: Workload


@dataclass
class Timed:
    """What a cell did, round by round; a round's `result` is the worker's."""

    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens a second."""
        return [result["tokens"] / result["seconds"] for result in self.results]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [step for result in self.results for step in result["steps"]]


class Fleet:
    """vLLM engines by name, each in a process of its own. As a context manager it
    starts and ends them."""

    def __init__(self, specs: Sequence[EngineSpec], logs: Path) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.about: dict[str, Any] = {}
        self._logs = logs
        self._workers: dict[str, Worker] = {}
        self._idle = {"cpu_seconds": 0.0, "seconds": 0.0}

    def __enter__(self) -> "Fleet":
        command = package_worker("vllm_worker")
        try:
            for name, spec in self.specs.items():
                worker = Worker(name, command, self._logs / f"{name}.log", ENVIRONMENT)
                self._workers[name] = worker
                worker.ask(
                    "start",
                    kind=spec.kind,
                    model=str(spec.model),
                    loopus=dict(spec.loopus),
                    options=dict(spec.options),
                )
            self.about = {name: worker.answer() for name, worker in self._workers.items()}
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        for worker in self._workers.values():
            worker.end_input()
        for worker in self._workers.values():
            worker.close()

    @property
    def idle_share(self) -> float | None:
        """CPU time of engines that waited for their turn, over the time they waited."""
        seconds = self._idle["seconds"]
        return self._idle["cpu_seconds"] / seconds if seconds else None

    def warm_up(self, workload: Workload) -> None:
        """Once on each engine, untimed."""
        for name in self._workers:
            self.run(name, workload)

    def run(
        self, engine: str, workload: Workload, *, gap: float = 0.0, answers: bool = False
    ) -> dict[str, Any]:
        """A whole workload."""
        return self.interleave({engine: workload}, None, gap=gap, answers=answers)[engine]

    def profile(self, engine: str, workload: Workload) -> dict[str, Any]:
        """Seconds by part."""
        result: dict[str, Any] = self._workers[engine].call("profile", requests=workload.to_json())
        return result

    def rounds(
        self, cells: Sequence[Cell], least: int, seconds: float, most: int = 99, gap: float = 0.0
    ) -> dict[str, Timed]:
        """All cells in turn, back and forth: at least so many rounds, more while time is left."""
        timed = {cell.name: Timed() for cell in cells}
        begun = time.monotonic()
        for number in range(most):
            taken = time.monotonic() - begun
            if number >= least and taken * (number + 1) / number > seconds:
                break
            for cell in cells if number % 2 == 0 else reversed(cells):
                timed[cell.name].results.append(self.run(cell.engine, cell.workload, gap=gap))
        return timed

    def interleave(
        self,
        workloads: Mapping[str, Workload],
        slice_seconds: float | None,
        *,
        gap: float = 0.0,
        answers: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """A workload on each engine, slices of so many seconds in turn until all have finished."""
        for name, workload in workloads.items():
            self._workers[name].call("begin", requests=workload.to_json(), gap=gap)
        going = list(workloads)
        while going:
            for name in list(going):
                if self._turn(name, slice_seconds):
                    going.remove(name)
            going.reverse()
        return {name: self._workers[name].call("result", answers=answers) for name in workloads}

    def _turn(self, name: str, seconds: float | None) -> bool:
        others = [worker for other, worker in self._workers.items() if other != name]
        before, begun = sum(worker.cpu_seconds() for worker in others), time.monotonic()
        done = bool(self._workers[name].call("advance", seconds=seconds))
        self._idle["cpu_seconds"] += sum(worker.cpu_seconds() for worker in others) - before
        self._idle["seconds"] += (time.monotonic() - begun) * len(others)
        return done
