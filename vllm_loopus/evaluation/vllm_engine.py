"""The `vllm` model type of lm-evaluation-harness with loop knobs and metrics."""

import os
from typing import Any

from lm_eval.models.vllm_causallms import VLLM
from vllm import SamplingParams
from vllm.platforms import current_platform

from vllm_loopus.evaluation.models import Setting
from vllm_loopus.evaluation.work import Work
from vllm_loopus.serving.frontend.metrics import PREFIX
from vllm_loopus.serving.hooks.cpu_memory import CPU_CACHE_SHARE, free_cpu_memory


def plain_options() -> dict[str, int | bool]:
    """Engine arguments of a plain model on a CPU; looped models have the same without.

    - Not compiled: that takes vLLM minutes, more than most evaluations on a CPU.
    - With less K/V memory: vLLM's default of 92 % of all memory often prevents the start
      (`serving/hooks/cpu_memory.py`).
    """
    if not current_platform.is_cpu():
        return {}
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {"enforce_eager": True}
    memory = int(CPU_CACHE_SHARE * free_cpu_memory()[0])
    return {"enforce_eager": True, "kv_cache_memory_bytes": memory}


class VLLMModel(VLLM):
    """lm-eval's `vllm` type. One engine evaluates all settings of a model, one after the other."""

    knobs: dict[str, Any]

    def apply(self, setting: Setting) -> None:
        """Applies a setting to all later requests, and empties the prefix cache."""
        self.knobs = setting.knobs()
        self.model.reset_prefix_cache()

    def work(self) -> Work:
        """The work from the loop metrics; empty for a plain model, which has none."""
        found = {
            metric.name.removeprefix(PREFIX): metric
            for metric in self.model.get_metrics()
            if metric.name.startswith(PREFIX)
        }
        if not found:
            return Work()
        return Work(
            positions=found["full_depth_rows"].value / found["max_loops"].value,
            rows=found["rows"].value,
            exits=found["exit_depth"].count,
            depths=found["exit_depth"].sum,
        )

    def close(self) -> None:
        """Ends the engine's process."""
        self.model.llm_engine.engine_core.shutdown()

    def _model_generate(
        self,
        requests: list[list[int]],
        generate: bool = False,
        sampling_params: list[SamplingParams] | SamplingParams | None = None,
    ) -> Any:
        """As in lm-eval, with the loop knobs in all sampling parameters."""
        if not generate or sampling_params is None:
            sampling_params = SamplingParams(
                temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False
            )
        if not isinstance(sampling_params, list):
            sampling_params = [sampling_params]
        for params in sampling_params:
            params.extra_args = self.knobs or None
        if len(sampling_params) == 1:
            sampling_params *= len(requests)
        return super()._model_generate(requests, generate=True, sampling_params=sampling_params)
