"""The stand-ins against vLLM's CPU operations, by Triton's interpreter. A program, not a test.

    PYTHONPATH=TRITON_FOLDER:benchmarks/device python -m stand_ins.compare

A line of JSON for each operation, shape and dtype. Exits with 1 if one is further from vLLM's than
rounding explains, with 2 where vLLM's CPU operations are missing.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from stand_ins import kernels

# Of the greatest value: two units in the last place, for the CPU's kernels round elsewhere.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
EPSILON = 1e-6
Operation = Callable[..., None]
Tensors = list[torch.Tensor]


def cases(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[Operation], Tensors]]]:
    """The operation, the case in words, and what gives its results for an operation."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    for rows, width in ((1, 64), (5, 128), (3, 2560)):
        x, residual, weight = random(rows, width), random(rows, width), random(width)
        yield "rms_norm", f"{rows}x{width}", partial(norm, x, weight)
        yield "fused_add_rms_norm", f"{rows}x{width}", partial(add_norm, x, residual, weight)
    heads = random(5, 6 * 64)[:, : 4 * 64].view(5, 4, 64)  # a slice of a fused q, k, v
    yield "rms_norm", "heads 5x4x64", partial(norm, heads, random(64))
    for rows, width in ((1, 96), (4, 3072)):
        yield "silu_and_mul", f"{rows}x{width}", partial(silu, random(rows, 2 * width))
    for neox in (True, False):
        for head, rotated in ((64, 64), (128, 64)):
            table, fused = random(128, rotated), random(6, (4 + 2) * head)
            case = partial(rotate, fused, head, table, neox)
            yield "rotary_embedding", f"head {head}, {rotated} rotated, neox {neox}", case


def norm(x: torch.Tensor, weight: torch.Tensor, run: Operation) -> Tensors:
    # What is not written is seen. vLLM's CPU operation takes whole rows only.
    out = torch.full(x.shape, float("nan"), dtype=x.dtype)
    run(out, x if run is kernels.rms_norm else x.contiguous(), weight, EPSILON)
    return [out]


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, run: Operation
) -> Tensors:
    x, residual = x.clone(), residual.clone()
    run(x, residual, weight, EPSILON)
    return [x, residual]


def silu(x: torch.Tensor, run: Operation) -> Tensors:
    out = torch.full((len(x), x.shape[1] // 2), float("nan"), dtype=x.dtype)
    run(out, x)
    return [out]


def rotate(
    fused: torch.Tensor, head: int, table: torch.Tensor, neox: bool, run: Operation
) -> Tensors:
    fused = fused.clone()
    query, key = fused[:, : 4 * head], fused[:, 4 * head :]
    run(torch.tensor([0, 1, 5, 17, 3, 99]), query, key, head, table, neox)
    return [fused]


def distance(one: Tensors, other: Tensors) -> float:
    """The greatest difference, of the greatest value; NaN where one is."""
    pairs = zip(one, other, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def main() -> int:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not current_platform.is_cpu() or not hasattr(torch.ops._C, "rms_norm"):
        print("vLLM's CPU operations are not here", file=sys.stderr)
        return 2
    same = True
    for dtype, close in CLOSE.items():
        for name, case, results in cases(dtype):
            worst = distance(results(getattr(kernels, name)), results(getattr(torch.ops._C, name)))
            holds = worst <= close  # not for NaN
            same &= holds
            line = {"operation": name, "case": case, "dtype": str(dtype).removeprefix("torch.")}
            print(json.dumps({**line, "worst": worst, "close": holds}), flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
