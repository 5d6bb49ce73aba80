"""Which `--kv-cache-dtype` is possible, checked before anything is loaded.

vLLM checks the dtypes of its GPU backends itself when it chooses one. On a CPU it checks nothing
before its kernels run.
"""

from typing import TYPE_CHECKING

import torch
from vllm.platforms import CpuArchEnum, current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_loopus.serving.model.kv_dtype import KV_DTYPES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_kv_dtype(vllm_config: "VllmConfig") -> None:
    """Raises `ValueError` that names the option, its value and the fix."""
    cache = vllm_config.cache_config
    if cache.kv_cache_dtype_skip_layers:
        raise ValueError(
            f"kv_cache_dtype_skip_layers={cache.kv_cache_dtype_skip_layers} is not possible with a "
            "looped model: all layers share one page size; leave it out"
        )
    offered = KV_DTYPES
    if current_platform.is_cpu():
        own = str(vllm_config.model_config.dtype).removeprefix("torch.")  # the same as auto
        supports = CPUAttentionBackend.supports_kv_cache_dtype
        offered = tuple(d for d in KV_DTYPES if d == own or supports(d))
    if cache.cache_dtype not in offered:
        raise ValueError(
            f"kv_cache_dtype={cache.cache_dtype!r} is not possible with a looped model on this "
            f"platform; use one of {', '.join(offered)}"
        )
    if current_platform.is_cpu() and is_quantized_kv_cache(cache.cache_dtype):
        _check_cpu(vllm_config)


def _check_cpu(vllm_config: "VllmConfig") -> None:
    """What vLLM's CPU kernels need for fp8 (`_get_attn_isa` in its `cpu_attn.py`)."""
    kv_dtype = vllm_config.cache_config.cache_dtype
    x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    if not (x86 and (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported())):
        raise ValueError(f"kv_cache_dtype={kv_dtype!r} needs a CPU with AVX-512 or AMX; use 'auto'")
    head_size = vllm_config.model_config.get_head_size()
    if head_size % 32:
        raise ValueError(
            f"kv_cache_dtype={kv_dtype!r} needs a head size that is a multiple of 32 on a CPU, and "
            f"this model has {head_size}; use 'auto'"
        )
