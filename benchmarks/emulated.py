"""A device that is emulated: what is left of its time if calls to the model cost no host time.

The engine is the real one: scheduler, worker, model runner, sampler. The model's regions compute
nothing; a virtual device is busy for a fixed time instead. As on a GPU, launching returns at once,
and calls run one after the other. Whoever reads a value waits until the device has come to it: not
for what was launched later.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_loopus.bench.workers.probe import PartTimer


@dataclass(frozen=True)
class Times:
    """What calls take, in seconds: a pass over n rows `per_pass + per_row * n`, a decoder call with
    LM head, sampling and encoder `per_boundary`."""

    per_pass: float
    per_row: float
    per_boundary: float


@dataclass
class Device:
    """The virtual device."""

    times: Times
    on: bool = False
    free: float = 0.0  # when it is done with all that has been launched
    busy: float = 0.0
    waited: float = 0.0
    calls: int = 0
    syncs: int = 0

    def launch(self, seconds: float) -> None:
        if self.on:
            self.free = max(self.free, time.perf_counter()) + seconds
            self.busy += seconds
            self.calls += 1

    def wait(self, until: float) -> None:
        if not self.on:
            return
        self.syncs += 1
        began = now = time.perf_counter()
        while now < until:  # spins, as CUDA does by default
            now = time.perf_counter()
        self.waited += now - began

    def reset(self) -> None:
        """Counts from here on."""
        self.busy = self.waited = 0.0
        self.calls = self.syncs = 0


def install(device: Device) -> None:
    """Replaces what computes on the device, in this process, before an engine is built."""
    from vllm_loopus.serving.model.loopus import LoopUSForCausalLM
    from vllm_loopus.serving.worker import transfer
    from vllm_loopus.serving.worker.executor import PagedExecutor

    times = device.times

    def encode(self: Any, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor]:
        device.launch(0.0)  # its time is in the boundary's
        return (torch.zeros(len(ids), self.config.hidden_size),)

    def refine(self: Any, state: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        device.launch(times.per_pass + times.per_row * len(state))
        return state, state

    def decode(self: Any, state: torch.Tensor, *rest: Any) -> torch.Tensor:
        device.launch(times.per_boundary)
        return state

    def compute_logits(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden), self.config.vocab_size)  # in the boundary's time, too

    def get_top_tokens(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden), dtype=torch.int64)

    for method in (encode, refine, decode, compute_logits, get_top_tokens):
        setattr(LoopUSForCausalLM, method.__name__, method)
    begin, wait = transfer.HostCopy.__init__, transfer.HostCopy.wait

    def queued(self: Any, values: torch.Tensor) -> None:
        begin(self, values)
        self.ready = device.free

    def waited(self: Any) -> Any:
        device.wait(self.ready)
        return wait(self)

    transfer.HostCopy.__init__ = queued  # type: ignore[method-assign]
    transfer.HostCopy.wait = waited  # type: ignore[method-assign]
    PagedExecutor.asynchronous = property(lambda self: True)  # type: ignore[assignment]
    _without_overlap(device)


def _without_overlap(device: Device) -> None:
    """vLLM's own reading of the tokens, where ours does not stand in for it."""
    from vllm_loopus.serving.runners.adapter import LoopAdapter

    sample: Callable[..., Any] = LoopAdapter.sample_tokens

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = sample(self, grammar_output)
        if not self._overlaps:
            device.wait(device.free)
        return output

    LoopAdapter.sample_tokens = sample_tokens  # type: ignore[method-assign]


def watch_parts(parts: PartTimer) -> None:
    """Which methods are which part."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_loopus.serving.core.scheduler import LoopUSScheduler
    from vllm_loopus.serving.runners.v1 import V1Adapter
    from vllm_loopus.serving.step.run import StepRunner
    from vllm_loopus.serving.worker.executor import PagedExecutor
    from vllm_loopus.serving.worker.sequences import RunningSequences
    from vllm_loopus.serving.worker.transfer import HostCopy

    for owner, name, part in (
        (Scheduler, "schedule", "schedule: vLLM's"),
        (LoopUSScheduler, "schedule", "schedule: ours"),
        (Scheduler, "update_from_output", "update: vLLM's"),
        (LoopUSScheduler, "update_from_output", "update: ours"),
        (OutputProcessor, "process_outputs", "outputs"),
        (GPUModelRunner, "execute_model", "runner: before and after the model"),
        (GPUModelRunner, "sample_tokens", "runner: sampling"),
        (V1Adapter, "execute_model", "adapter"),
        (V1Adapter, "sample_tokens", "adapter"),
        (RunningSequences, "receive", "sequences"),
        (RunningSequences, "begin_step", "sequences"),
        (RunningSequences, "go_on", "sequences"),
        (RunningSequences, "finish", "sequences"),
        (StepRunner, "run", "step: logic"),
        (StepRunner, "go_on", "step: logic"),
        (PagedExecutor, "make_room", "step: blocks"),
        (PagedExecutor, "encode", "launch: encoder"),
        (PagedExecutor, "run_passes", "launch: passes"),
        (PagedExecutor, "decode", "launch: decoder"),
        (HostCopy, "wait", "waiting for the device"),
    ):
        parts.wrap(part, owner, name)
