"""How much memory there is for K/V on a CPU."""

import os
from typing import TYPE_CHECKING

from vllm.config import CacheConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info
from vllm.utils.math_utils import cdiv

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.loopus")

CPU_CACHE_SHARE = 0.4  # of what is free, for K/V


def free_cpu_memory() -> tuple[int, int]:
    """The free bytes of the memory node that has the least, as vLLM's own check counts them, and
    the number of nodes in use."""
    nodes = {cpu.numa_node for cpu in get_allowed_cpu_list()}
    return min(get_memory_node_info(node).available_memory for node in nodes), len(nodes)


def size_cpu_cache(vllm_config: "VllmConfig") -> None:
    """On a CPU, gives K/V a share of the memory that is free now, unless the user sized it.

    vLLM's own default claims 92 % of all memory and refuses to start if less is free.
    """
    cache = vllm_config.cache_config
    if (
        not current_platform.is_cpu()
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or cache.kv_cache_memory_bytes is not None
        or cache.gpu_memory_utilization != CacheConfig.gpu_memory_utilization
    ):
        return
    free, nodes = free_cpu_memory()
    parallel = vllm_config.parallel_config
    ranks = cdiv(parallel.world_size * max(parallel.data_parallel_size_local, 1), nodes)
    cache.kv_cache_memory_bytes = int(CPU_CACHE_SHARE * free) // ranks
    logger.info(
        "K/V gets %.1f GiB on each rank, %d %% of the memory node's free memory; "
        "VLLM_CPU_KVCACHE_SPACE (GiB) overrides",
        cache.kv_cache_memory_bytes / 2**30,
        100 * CPU_CACHE_SHARE,
    )
