"""What a vLLM engine in this process did: rows and times of its steps, and time by part."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass
class Step:
    """`rows`, `pass_seconds`: of each pass. `tokens`: given; `decoder_rows`: with catch-up.
    `running`: sequences at the step's beginning."""

    seconds: float = 0.0
    rows: list[int] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    decoder_rows: int = 0
    running: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Probe:
    """Reads off an engine what a looped model does in each step. Other models have no passes."""

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler: Any = core.scheduler
        self.runner: Any = core.model_executor.driver_worker.worker.model_runner
        self._engine: Any = llm.llm_engine
        self._pool: Any = self.scheduler.kv_cache_manager.block_pool
        self._step = Step()
        self._update = self.scheduler.update_from_output
        self.scheduler.update_from_output = self._read
        if torch.cuda.is_available() and (executor := self._executor) is not None:
            # Passes that decide nothing, of prompts in chunks, do not wait; their time is theirs.
            executor.run_passes = _synchronised(executor.run_passes)

    @property
    def _executor(self) -> Any:
        sequences = getattr(self.runner, "_sequences", None)
        return getattr(sequences, "_executor", None)

    @property
    def blocks_in_use(self) -> int:
        return int(self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks())

    def step(self) -> tuple[list[Any], Step]:
        """One step of the engine: its outputs, and what it did."""
        self._step = Step()
        started = time.perf_counter()
        outputs: list[Any] = self._engine.step()
        self._step.seconds = time.perf_counter() - started
        return outputs, self._step

    def resume(self) -> None:
        """Time has passed that was not the engine's: its own clock is not to learn from it."""
        if (clock := getattr(self.scheduler, "_clock", None)) is not None:
            clock.pause()

    def _read(self, scheduled: Any, output: Any) -> Any:
        loop = getattr(output, "loop", None)
        self._step.running = len(self.scheduler.running)
        if loop is not None:
            self._step.rows = loop.stats.passes
            self._step.pass_seconds = [seconds or 0.0 for seconds in loop.times.seconds]
            self._step.tokens = len(loop.exit_depths)
            self._step.decoder_rows = loop.stats.decoder_rows
        return self._update(scheduled, output)

    @contextmanager
    def timed(self) -> Iterator["PartTimer"]:
        """Inside, time is taken by part of the engine, each without the parts inside it."""
        timer = PartTimer()
        model, executor = self.runner.model, self._executor
        parts = [
            ("engine: outputs and requests", self._engine, "step"),
            ("scheduler", self.scheduler, "schedule"),
            ("scheduler", self.scheduler, "update_from_output"),
            ("runner", self.runner, "execute_model"),
            ("sampler", self.runner, "sample_tokens"),
            ("LM head", model, "compute_logits"),
        ]
        if executor is None:
            parts += [("model", self.runner, "_model_forward")]
        else:
            parts += [
                ("control of the step", self.runner._sequences, "step"),
                ("encoder", executor, "encode"),
                ("passes: around the layers", executor, "run_passes"),
                ("passes: layers", model, "refine"),
                ("decoder", executor, "decode"),
            ]
        try:
            for part, owner, name in parts:
                timer.wrap(part, owner, name)
            yield timer
        finally:
            timer.unwrap()


PASSES = ("passes: layers", "passes: around the layers")
BOUNDARY = ("encoder", "decoder", "LM head", "sampler")


class PartTimer:
    """Exclusive time of functions that call each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # seconds of the parts inside, for each one open
        self._wrapped: list[tuple[Any, str, bool, Any]] = []

    def wrap(self, part: str, owner: Any, name: str) -> None:
        function = getattr(owner, name)
        self._wrapped.append((owner, name, name in vars(owner), function))
        setattr(owner, name, self._timed(part, function))

    def unwrap(self) -> None:
        for owner, name, was_own, function in reversed(self._wrapped):
            if was_own:
                setattr(owner, name, function)
            else:
                delattr(owner, name)
        self._wrapped.clear()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = _now()
            try:
                return function(*args, **kwargs)
            finally:
                taken = _now() - started
                self.seconds[part] += taken - self._inside.pop()
                if self._inside:
                    self._inside[-1] += taken

        return timed


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _synchronised(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        torch.cuda.synchronize()
        return result

    return called
