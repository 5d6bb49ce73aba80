"""Registers the stand-ins under the names that vLLM calls; Triton is needed at the first call."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

# The signatures of vLLM's own (`csrc/`), by name.
SIGNATURES = {
    "rms_norm": "(Tensor(a!) result, Tensor input, Tensor? weight, float epsilon) -> ()",
    "fused_add_rms_norm": "(Tensor(a!) input, Tensor(b!) residual, Tensor? weight, float epsilon)"
    " -> ()",
    "silu_and_mul": "(Tensor(a!) result, Tensor input) -> ()",
    "rotary_embedding": "(Tensor positions, Tensor(a!) query, Tensor(b!)? key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
}
# What vLLM asks its compiled part about the card; none of it is here.
QUESTIONS = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)


def register() -> None:
    """Called once a process, in place of loading vLLM's compiled part."""
    library = torch.library.Library("_C", "FRAGMENT")
    for name, signature in SIGNATURES.items():
        library.define(name + signature)
        library.impl(name, _called(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"_C::{name}", _nothing, lib=library)
    for name in QUESTIONS:
        library.define(f"{name}(int capability) -> bool")
        library.impl(name, _no, "CompositeExplicitAutograd")
    register.library = library  # type: ignore[attr-defined]  # it lives as long as the process


def _called(name: str) -> Callable[..., None]:
    def operation(*arguments: Any, **options: Any) -> None:
        kernels = import_module(f"{__package__}.kernels")
        getattr(kernels, name)(*arguments, **options)

    return operation


def _nothing(*_arguments: Any, **_options: Any) -> None:
    return None


def _no(_capability: int) -> bool:
    return False
