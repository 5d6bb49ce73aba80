"""vLLM's workers with our model runner."""

from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_loopus.serving.runner import adopt

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
elif current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class LoopUSWorker(PlatformWorker):
    """The platform's worker; its model runner runs the loop."""

    model_runner: Any

    def init_device(self) -> Any:
        result = super().init_device()
        if self.use_v2_model_runner:
            raise ValueError(
                "VLLM_USE_V2_MODEL_RUNNER=1 is not possible with a LoopUS model: early exit runs "
                "on the V1 model runner; unset it"
            )
        self.model_runner = adopt(self.model_runner)
        return result
