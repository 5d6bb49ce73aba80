"""The operations: what vLLM's compiled ones of the same names compute, in place of `out` or inputs.

Products and sums are in float32 and rounded where vLLM's kernels round.
"""

from typing import Any

import torch
import triton
import triton.language as tl

ROW_PART = 1024  # elements of a row that one program of `silu_and_mul` takes


@triton.jit
def _norm(
    out,
    x,
    residual,
    weight,
    inner_rows,
    inner_stride,
    outer_stride,
    width,
    epsilon,
    adds: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    """Rows of `x` at two strides; `out` and `residual` are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    start = (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride
    at = tl.arange(0, block)
    inside = at < width
    value = tl.load(x + start + at, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    if adds:
        added = tl.load(residual + row * width + at, mask=inside, other=0.0)
        value = (wide + added.to(tl.float32)).to(value.dtype)
        wide = value.to(tl.float32)
        tl.store(residual + row * width + at, value, mask=inside)
    wide = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + epsilon))
    if weighted:
        scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        wide = wide.to(value.dtype).to(tl.float32) * scale
    tl.store(out + row * width + at, wide.to(value.dtype), mask=inside)


@triton.jit
def _silu_and_mul(out, x, width, block: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * block + tl.arange(0, block)
    inside = at < width
    gate = tl.load(x + row * 2 * width + at, mask=inside, other=0.0)
    up = tl.load(x + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * width + at, (active * up).to(gate.dtype), mask=inside)


@triton.jit
def _rotate(
    x,
    positions,
    cos_sin,
    row_stride,
    head_stride,
    half,
    table_stride,
    neox: tl.constexpr,
    block: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, block)
    inside = at < half
    table = cos_sin + tl.load(positions + row).to(tl.int64) * table_stride
    cos = tl.load(table + at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(table + half + at, mask=inside, other=0.0).to(tl.float32)
    start = x + row * row_stride + head * head_stride
    if neox:
        one, two = start + at, start + half + at
    else:
        one, two = start + 2 * at, start + 2 * at + 1
    a = tl.load(one, mask=inside, other=0.0)
    b = tl.load(two, mask=inside, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    tl.store(one, (wide_a * cos - wide_b * sin).to(a.dtype), mask=inside)
    tl.store(two, (wide_b * cos + wide_a * sin).to(b.dtype), mask=inside)


def rms_norm(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> None:
    """`out` [..., H], contiguous: the norm of `x` [..., H], which may be a slice of wider rows
    (the heads of a fused q, k, v)."""
    width = x.shape[-1]
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 3:
        inner, inner_stride, outer_stride = x.shape[1], x.stride(1), x.stride(0)
    else:
        x = x if x.dim() == 2 else x.reshape(-1, width)
        inner, inner_stride, outer_stride = 1, 0, x.stride(0)
    _launch_norm(out, x, None, weight, (inner, inner_stride, outer_stride), epsilon)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> None:
    """`residual += x`, then `x` is the norm of `residual`; both [T, H], contiguous, in place."""
    _launch_norm(x, x, residual, weight, (1, 0, x.shape[-1]), epsilon)


def _launch_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    strides: tuple[int, int, int],
    epsilon: float,
) -> None:
    width = out.shape[-1]
    rows, block = out.numel() // width, triton.next_power_of_2(width)
    if rows:
        _norm[(rows,)](
            out,
            x,
            x if residual is None else residual,
            out if weight is None else weight,
            *strides,
            width,
            epsilon,
            adds=residual is not None,
            weighted=weight is not None,
            block=block,
            num_warps=_warps(block),
        )


def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    """`out` [..., H]: SiLU of the first half of the rows of `x` [..., 2 H], times the second."""
    width = out.shape[-1]
    rows = out.numel() // width
    if rows:
        grid = rows, triton.cdiv(width, ROW_PART)
        _silu_and_mul[grid](out, x.contiguous(), width, block=ROW_PART)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """`query`, `key` [T, heads * head_size] or [T, heads, head_size], rotated in place.

    Raises `NotImplementedError` for what dense models do not ask for.
    """
    if rope_dim_offset or inverse:
        raise NotImplementedError(f"rope_dim_offset={rope_dim_offset}, inverse={inverse}")
    half = cos_sin_cache.shape[-1] // 2
    for x in (query, key):
        if x is None or not x.numel():
            continue
        heads = x.shape[-1] // head_size if x.dim() == 2 else x.shape[-2]
        _rotate[(positions.numel(), heads)](
            x,
            positions,
            cos_sin_cache,
            x.stride(0),
            head_size if x.dim() == 2 else x.stride(-2),
            half,
            cos_sin_cache.stride(0),
            neox=is_neox,
            block=triton.next_power_of_2(half),
            num_warps=1,
        )


def _warps(block: Any) -> int:
    return 8 if block > 2048 else 4 if block > 256 else 1
