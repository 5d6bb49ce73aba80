"""What the machine has, and its ceilings: bytes a second of a copy, operations of a product.

python -m measures.machine
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from measures.engines import wait
from measures.probe import probe
from measures.program import end, parser, saying


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of a call and what it launches, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def copy_bandwidth(elements: int) -> float:
    """Bytes a second, read and written, of a copy of so many float32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 10)


def product_rate(width: int) -> float:
    """Operations a second of a bfloat16 product of square matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    return 2 * width**3 / median_seconds(lambda: one @ one, 10)


def main() -> None:
    given = parser(__doc__).parse_args()
    say = saying(given)
    say(**probe())
    say(
        copy_bytes_s=copy_bandwidth(2**20 if given.tiny else 2**30),
        product_flop_s=product_rate(64 if given.tiny else 8192),
    )
    end(given.tiny or torch.cuda.is_available())


if __name__ == "__main__":
    main()
