"""vLLM's workers with our model runner."""

from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_loopus.serving.model.cpu_kernels import permit_tiles
from vllm_loopus.serving.runners.adapter import LoopAdapter, adopt
from vllm_loopus.serving.runners.start_up import carry_bytes, check_depth_fits

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
        permit_tiles()
        result = super().init_device()
        adapter: type[LoopAdapter]
        if self.use_v2_model_runner:
            from vllm_loopus.serving.runners.v2 import V2Adapter

            adapter = V2Adapter
        else:
            from vllm_loopus.serving.runners.v1 import V1Adapter

            adapter = V1Adapter
        self.model_runner = adopt(self.model_runner, adapter)
        return result

    def determine_available_memory(self) -> int:
        """As in vLLM, without what exit rules keep. Raises `ValueError` if no sequence fits at full
        depth."""
        available: int = super().determine_available_memory()
        planes = self.model_runner.get_model().planes
        if planes.decodes_in_passes and self.cache_config.kv_cache_memory_bytes is None:
            available -= carry_bytes(self.vllm_config)
        check_depth_fits(self.vllm_config, planes.layout, available)
        return available
