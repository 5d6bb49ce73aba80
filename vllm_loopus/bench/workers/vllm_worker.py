"""A vLLM engine: a looped model on our classes or as a plain loop, or a base model.

python -m vllm_loopus.bench.workers.vllm_worker     # JSON lines, see channel.py
"""

import os
import time
from collections import Counter
from typing import Any

from vllm_loopus.bench.workers.channel import serve
from vllm_loopus.bench.workers.probe import Probe, Step

OURS, PLAIN, BASE = "ours", "plain", "base"


class Engine:
    """One engine, and the requests that it is given at a time."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._probe: Any = None
        self._count = 0

    def start(self, kind: str, model: str, loopus: dict[str, Any], options: dict[str, Any]) -> Any:
        """`options`: of vLLM's `LLM`. Returns what the engine is."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import torch
        from vllm import LLM, __version__
        from vllm.platforms import current_platform

        if kind == PLAIN:  # the model's own forward, a fixed loop, under vLLM's own classes
            worker = "cpu_worker.CPUWorker" if current_platform.is_cpu() else "gpu_worker.Worker"
            options["scheduler_cls"] = "vllm.v1.core.sched.scheduler.Scheduler"
            options["worker_cls"] = f"vllm.v1.worker.{worker}"
        elif kind == OURS:
            options["additional_config"] = {"loopus": loopus}
        self._llm = LLM(model, skip_tokenizer_init=True, enable_prefix_caching=False, **options)
        self._probe = Probe(self._llm)
        config = self._llm.llm_engine.vllm_config
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
            "kv_bytes": self._kv_bytes() if kind == OURS else None,
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
        self._waiting = list(reversed(requests))
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
        """Goes on for so long, None: to the end; whether the end has come."""
        self._probe.resume()
        begun = time.perf_counter()
        while not (done := self._one_step()):
            if seconds is not None and time.perf_counter() - begun >= seconds:
                break
        self._busy += time.perf_counter() - begun
        return done

    def _one_step(self) -> bool:
        """Whether nothing is left to do."""
        engine = self._llm.llm_engine
        while self._waiting and self._due(self._waiting[-1]) <= time.perf_counter():
            self._add(self._waiting.pop())
        if not engine.has_unfinished_requests():
            if not self._waiting:
                return True
            time.sleep(max(0.0, self._due(self._waiting[-1]) - time.perf_counter()))
            self._probe.resume()
            return False
        outputs, step = self._probe.step()
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

    def _due(self, request: dict[str, Any]) -> float:
        return float(self._started + request["arrival"] * self._gap)

    def _add(self, request: dict[str, Any]) -> None:
        from vllm import SamplingParams

        self._count += 1
        name = str(self._count)
        knobs = dict(request["knobs"])
        if request["exits"] is not None:
            knobs["exit_depths"] = request["exits"]
        params = SamplingParams(
            temperature=0,
            max_tokens=request["tokens"],
            ignore_eos=True,
            detokenize=False,
            extra_args=knobs,
        )
        self._arrived[name] = self._due(request)
        prompt = {"prompt_token_ids": request["prompt"]}
        self._llm.llm_engine.add_request(name, prompt, params)

    def result(self, answers: bool = False) -> Any:
        """Of the workload that has come to its end."""
        from vllm_loopus.serving.messages.exit_depths import SPAN, exit_depths

        depths: Counter[int] = Counter()
        told = []
        for name in sorted(self._outputs, key=int):
            completion = self._outputs[name].outputs[0]
            if hasattr(completion, SPAN):
                depths.update(exit_depths(completion))
            told.append(list(completion.token_ids))
        return {
            "seconds": self._busy,
            "tokens": sum(map(len, told)),
            "steps": [step.to_dict() for step in self._steps],
            "peak_blocks": self._peak_blocks,
            "first_token": [self._first[n] - self._arrived[n] for n in self._arrived],
            "whole": [self._last[n] - self._arrived[n] for n in self._arrived],
            "exit_depths": {str(depth): depths[depth] for depth in sorted(depths)},
            "answers": told if answers else None,
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
    engine = Engine()
    commands = (engine.start, engine.begin, engine.advance, engine.result, engine.profile)
    serve({command.__name__: command for command in commands})
    os._exit(0)  # nothing is left to be kept, and vLLM's own end takes seconds


if __name__ == "__main__":
    main()
