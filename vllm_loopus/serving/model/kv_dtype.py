"""What a `--kv-cache-dtype` means for a page of the K/V memory: its bytes, and which of them are
floating-point numbers.

vLLM quantises K and V when it writes them and reads them in its attention kernels; the scales are
those of the checkpoint, 1, or (`*_per_token_head`) stored beside each head's numbers.
"""

import torch
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, kv_cache_uses_per_token_head_scales

AUTO = "auto"
# One page size for all layers, whose rows can hold states as well. What vLLM offers besides these
# stores some layers in another format.
KV_DTYPES: tuple[CacheDType, ...] = (
    AUTO,
    "bfloat16",
    "float16",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "int8_per_token_head",
    "fp8_per_token_head",
    "int4_per_token_head",
)
SCALE = torch.float32  # of a token and head


def kv_bytes(heads: int, head_size: int, kv_dtype: str, model_dtype_bytes: int) -> int:
    """Bytes of K and V of one token in one layer with `heads` K/V heads.

    The same as `page_size_bytes` of the spec of a vLLM layer, without loading one.
    """
    if kv_dtype == AUTO:
        return 2 * heads * head_size * model_dtype_bytes
    numbers = head_size // 2 if kv_dtype == "int4_per_token_head" else head_size
    side = numbers * STR_DTYPE_TO_TORCH_DTYPE[kv_dtype].itemsize
    if kv_cache_uses_per_token_head_scales(kv_dtype):
        side += SCALE.itemsize
    return 2 * heads * side


def floats_in(page: torch.Tensor, kv_dtype: str) -> list[torch.Tensor]:
    """The floating-point numbers in the K/V `page` of a layer [num_blocks, heads, block_size,
    width], as views [num_blocks, ...] of it: all that can be NaN or infinite."""
    if page.is_floating_point():
        return [page]
    if not kv_cache_uses_per_token_head_scales(kv_dtype):
        e5m2 = kv_dtype == "fp8_e5m2"
        return [page.view(torch.float8_e5m2 if e5m2 else current_platform.fp8_dtype())]
    half = page.shape[-1] // 2
    sides = page.narrow(-1, 0, half), page.narrow(-1, half, half)
    numbers = half - SCALE.itemsize // page.itemsize
    found = [side.narrow(-1, numbers, half - numbers).view(SCALE) for side in sides]
    if kv_dtype == "fp8_per_token_head":
        fp8 = current_platform.fp8_dtype()
        found += [side.narrow(-1, 0, numbers).view(fp8) for side in sides]
    return found
