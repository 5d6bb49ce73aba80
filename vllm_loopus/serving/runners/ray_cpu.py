"""vLLM's Ray executor on CPUs.

vLLM 0.32 asks Ray for the accelerators of a worker, and refuses a platform that has no name for
them (`Platform.ray_device_key`). A CPU worker needs none. Here it gets a bundle with one of Ray's
CPUs instead; the rest is vLLM's. Ray then counts one CPU for each rank, whatever number of cores
its threads are bound to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2


class RayCPUWorkerProc(ray_executor_v2.RayWorkerProc):
    """A worker in a Ray actor, without an accelerator."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), []


class RayCPUExecutor(ray_executor_v2.RayExecutorV2):
    """Used in place of vLLM's if `--distributed-executor-backend ray` is given on a CPU."""

    def _init_executor(self) -> None:
        with _bundles_of_cpus():
            super()._init_executor()

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        return {"num_gpus": 0}  # the bundle's CPU is reserved with it


@contextmanager
def _bundles_of_cpus() -> Iterator[None]:
    """Inside, vLLM's executor reserves CPUs and starts our workers."""
    platform = type(current_platform)
    before = platform.ray_device_key, ray_executor_v2.RayWorkerProc
    platform.ray_device_key, ray_executor_v2.RayWorkerProc = "CPU", RayCPUWorkerProc
    try:
        yield
    finally:
        platform.ray_device_key, ray_executor_v2.RayWorkerProc = before
