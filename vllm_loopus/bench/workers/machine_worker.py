"""What the machine can do at most: memory bandwidth and matrix rate, in the dtype of the model.

python -m vllm_loopus.bench.workers.machine_worker     # JSON lines, see channel.py
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vllm_loopus.bench.workers.channel import serve

COPIED = 2**28  # bytes: more than caches hold
ENOUGH = 0.2  # seconds of repeats of one measurement


def measure(dtype: str, device: str, hidden: int, intermediate: int, rows: list[int]) -> Any:
    """`copy`: bytes a second read and written; `matrix`: by rows, operations a second of products
    of the shape of the model's MLP, with weights too many for a cache."""
    precision = getattr(torch, dtype)
    source = torch.ones(COPIED // precision.itemsize, dtype=precision, device=device)
    target = torch.empty_like(source)
    copy = 2 * COPIED / _fastest(lambda: target.copy_(source))
    count = max(1, COPIED // (hidden * intermediate * precision.itemsize))
    weights = [torch.randn(hidden, intermediate, device=device).to(precision) for _ in range(count)]
    matrix, streamed = {}, 0.0
    for number in rows:
        row = torch.randn(number, hidden, device=device).to(precision)
        seconds = _fastest(partial(_products, row, weights)) / count
        matrix[str(number)] = 2 * number * hidden * intermediate / seconds
        streamed = max(streamed, hidden * intermediate * precision.itemsize / seconds)
    # Reading weights alone may be faster than copying.
    return {"copy": copy, "bandwidth": max(copy, streamed), "matrix": matrix}


def _products(row: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        row @ weight


def _fastest(function: Callable[[], Any]) -> float:
    function()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < ENOUGH:
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    serve({"measure": measure})
