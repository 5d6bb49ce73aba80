"""How much memory there is for K/V on a CPU."""

from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

CPU_CACHE_SHARE = 0.4  # of what is free, for K/V


def free_cpu_memory() -> tuple[int, int]:
    """Free bytes of the memory node that has the least, as vLLM's own check counts them, and the
    number of nodes in use."""
    nodes = {cpu.numa_node for cpu in get_allowed_cpu_list()}
    return min(get_memory_node_info(node).available_memory for node in nodes), len(nodes)
