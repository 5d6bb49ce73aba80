"""lm-evaluation-harness's `vllm` model type, with the knobs of a LoopUS request and its metrics."""

import os
from typing import Any

from lm_eval.models.vllm_causallms import VLLM
from vllm import SamplingParams
from vllm.platforms import current_platform

from vllm_loopus.evaluation.models import Setting
from vllm_loopus.evaluation.work import Work
from vllm_loopus.serving.frontend.metrics import PREFIX
from vllm_loopus.serving.hooks.cpu_memory import CPU_CACHE_SHARE, free_cpu_memory


def plain_memory() -> dict[str, int]:
    """Engine arguments for a plain model on a CPU, where vLLM's own default claims 92 % of all
    memory and often cannot start. For looped models `serving/hooks/cpu_memory.py` does this."""
    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    return {"kv_cache_memory_bytes": int(CPU_CACHE_SHARE * free_cpu_memory()[0])}


class VLLMModel(VLLM):
    """lm-eval's `vllm` type; one engine serves all settings of a model, in turn."""

    knobs: dict[str, Any]

    def apply(self, setting: Setting) -> None:
        """What follows is asked at this depth, and finds nothing in the prefix cache."""
        self.knobs = setting.knobs()
        self.model.reset_prefix_cache()

    def work(self) -> Work:
        """Of a plain model nothing is known: it has no such metrics."""
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
        """As in lm-eval, which makes the parameters of log-likelihood requests itself."""
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
