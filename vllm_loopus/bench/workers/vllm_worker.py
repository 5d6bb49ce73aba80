"""A vLLM engine: a looped model on our classes or as a plain loop, or a base model.

python -m vllm_loopus.bench.workers.vllm_worker     # JSON lines, see channel.py
"""

import os
import time
from collections import Counter
from typing import Any

import torch

from vllm_loopus.bench.workers.channel import serve
from vllm_loopus.bench.workers.engine import Kind, LocalEngine
from vllm_loopus.bench.workers.probe import Step
from vllm_loopus.bench.workloads import Request


class Driver:
    """One engine, and the workload that it works on."""

    def start(self, kind: Kind, model: str, loopus: dict[str, Any], options: dict[str, Any]) -> Any:
        """Builds the `LocalEngine`; returns what it is."""
        self._engine = LocalEngine(kind, model, loopus, options)
        self._probe = self._engine.probe
        config = self._engine.config
        from vllm import __version__
        from vllm.platforms import current_platform

        return {
            "vllm": __version__,
            "torch": torch.__version__,
            "device": current_platform.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "block_size": config.cache_config.block_size,
            "blocks": config.cache_config.num_gpu_blocks,
            "runner": type(self._probe.runner).__name__,
            "kv_bytes": self._kv_bytes() if kind == "ours" else None,
        }

    def _kv_bytes(self) -> dict[str, int]:
        """Of K/V and states of a position: for each depth it reaches, and at the full one."""
        layout = self._probe.runner.model.planes.layout
        return {
            "each_depth": layout.block_bytes_per_token,
            "full_depth": layout.allocated(layout.max_loops),
        }

    def begin(self, requests: list[dict[str, Any]], gap: float = 0.0) -> None:
        """Takes a workload in. `gap`: seconds between arrivals, on average."""
        self._waiting = [Request(**fields) for fields in reversed(requests)]
        self._gap = gap
        self._arrived: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._outputs: dict[str, Any] = {}
        self._steps: list[Step] = []
        self._peak_blocks = 0
        self._busy = 0.0
        self._started = time.perf_counter()

    def advance(self, seconds: float | None = None) -> bool:
        """Works for so many seconds, None: to the end. Returns whether all requests have ended."""
        self._probe.resume()
        begun = time.perf_counter()
        while not (done := self._one_step()):
            if seconds is not None and time.perf_counter() - begun >= seconds:
                break
        self._busy += time.perf_counter() - begun
        return done

    def _one_step(self) -> bool:
        """Returns whether all requests have ended."""
        while self._waiting and self._due(self._waiting[-1]) <= time.perf_counter():
            request = self._waiting.pop()
            self._arrived[self._engine.add(request)] = self._due(request)
        if not self._engine.unfinished:
            if not self._waiting:
                return True
            time.sleep(max(0.0, self._due(self._waiting[-1]) - time.perf_counter()))
            self._probe.resume()
            return False
        outputs, step = self._engine.step()
        now = time.perf_counter()
        self._steps.append(step)
        self._peak_blocks = max(self._peak_blocks, self._probe.blocks_in_use)
        for output in outputs:
            name = output.request_id
            if output.outputs[0].token_ids:
                self._first.setdefault(name, now)
            if output.finished:
                self._last[name], self._outputs[name] = now, output
        return False

    def _due(self, request: Request) -> float:
        """When a request comes, by the clock of `time.perf_counter`."""
        return self._started + request.arrival * self._gap

    def result(self, answers: bool = False) -> Any:
        """Of the workload that has ended. Times in seconds: `seconds` of work, `first_token` and
        `whole` of each request from its arrival on."""
        from vllm_loopus.serving.messages.exit_depths import SPAN, exit_depths

        depths: Counter[int] = Counter()
        answered = []
        for name in sorted(self._outputs, key=int):
            completion = self._outputs[name].outputs[0]
            if hasattr(completion, SPAN):
                depths.update(exit_depths(completion))
            answered.append(list(completion.token_ids))
        return {
            "seconds": self._busy,
            "tokens": sum(map(len, answered)),
            "steps": [step.to_dict() for step in self._steps],
            "peak_blocks": self._peak_blocks,
            "first_token": [self._first[n] - self._arrived[n] for n in self._arrived],
            "whole": [self._last[n] - self._arrived[n] for n in self._arrived],
            "exit_depths": {str(depth): depths[depth] for depth in sorted(depths)},
            "answers": answered if answers else None,
        }

    def profile(self, requests: list[dict[str, Any]]) -> Any:
        """Seconds by part of a workload, and what is outside the engine's steps."""
        with self._probe.timed() as timer:
            self.begin(requests)
            self.advance()
        parts = dict(timer.seconds)
        parts["outside the steps"] = self._busy - sum(parts.values())
        return {"seconds": self._busy, "parts": parts}


def main() -> None:
    driver = Driver()
    commands = (driver.start, driver.begin, driver.advance, driver.result, driver.profile)
    serve({command.__name__: command for command in commands})
    os._exit(0)  # there is nothing to save, and vLLM's own shutdown takes seconds


if __name__ == "__main__":
    main()
