"""A vLLM engine in this process: requests one by one, a step at a time, and what a step did."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from vllm_loopus.bench.workers.probe import Probe, Step
from vllm_loopus.bench.workloads import Request

# Ours; the model's own forward as a fixed loop under vLLM's own classes; a plain base model.
Kind = Literal["ours", "plain", "base"]


class LocalEngine:
    """Runs no process of its own, so that its parts can be looked at. No prefix caching."""

    def __init__(
        self, kind: Kind, model: str, loopus: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        """`model`: a folder. `loopus`: our engine options. `options`: those of vLLM's `LLM`.

        Raises what vLLM raises for options that cannot be.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported
        from vllm import LLM
        from vllm.platforms import current_platform

        own: dict[str, Any] = {}
        if kind == "plain":
            worker = "cpu_worker.CPUWorker" if current_platform.is_cpu() else "gpu_worker.Worker"
            own["scheduler_cls"] = "vllm.v1.core.sched.scheduler.Scheduler"
            own["worker_cls"] = f"vllm.v1.worker.{worker}"
        elif kind == "ours":
            own["additional_config"] = {"loopus": dict(loopus)}
        llm = LLM(model, skip_tokenizer_init=True, enable_prefix_caching=False, **own, **options)
        self._engine: Any = llm.llm_engine
        self.config: Any = self._engine.vllm_config
        self.probe = Probe(llm)
        self._count = 0

    def add(self, request: Request) -> str:
        """A request that comes now, whatever its `arrival`. Greedy; it ends after its number of
        tokens. Returns its id, a number as text, counted from 1."""
        from vllm import SamplingParams

        self._count += 1
        knobs = dict(request.knobs)
        if request.exits is not None:
            knobs["exit_depths"] = request.exits
        params = SamplingParams(
            temperature=0,
            max_tokens=request.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=knobs,
        )
        name = str(self._count)
        self._engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
        return name

    @property
    def unfinished(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> tuple[list[Any], Step]:
        """vLLM's `RequestOutput`s of one step, and what the step did."""
        return self.probe.step()

    def close(self) -> None:
        self._engine.engine_core.shutdown()
