"""What does the LoRA of a row's own depth cost beside its linear layer, and by which product?

For whoever changes `serving/model/by_depth.py`; docs/log.md has the numbers.

    python benchmarks/lora_by_depth.py                          # a minute, two cores
    python benchmarks/lora_by_depth.py --size 4096 --rank 512

One linear layer, rows at one depth or at all. `grouped` brings rows into the order of their depths
(on CPUs), `masked` is one product over all depths (on GPUs), `copies` is vLLM's punica operation
for CPUs, with depth as adapter, which copies the factors for every row. Ratios to the linear layer
alone, measured in turn; the median of the rounds.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink

from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.serving.model.by_depth import Depths, LoRAByDepth, RowsByDepth
from vllm_loopus.serving.model.shards import Shard

ROWS = (1, 4, 16, 64, 256)
MOST_COPIED = 2**28  # numbers: more is left out of `copies`


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--loops", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    report = begin()
    size, rank, loops = given.size, given.rank, given.loops
    linear: Any = nn.Linear(size, size, bias=False)
    depths = Depths()
    whole = (range(size),)
    shard = Shard((size, size), whole, range(size))
    lora = LoRAByDepth(linear, [shard], [rank], loops, depths)
    assert lora.lora_a is not None
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.02)
    expand = lora.lora_b[0].transpose(1, 2).contiguous()
    results = []
    for count in ROWS:
        x = torch.randn(count, size)
        for mixed in (False, True) if count > 1 else (False,):
            depth = torch.arange(count) % loops + 1 if mixed else torch.ones(count).long()
            grouped, masked = RowsByDepth.of(depth), RowsByDepth(depth - 1)
            ways: dict[str, Callable[[torch.Tensor], Any]] = {
                "alone": lambda y: None,
                "grouped": with_rows(lora, depths, grouped, x),
                "masked": with_rows(lora, depths, masked, x),
            }
            if count * rank * size <= MOST_COPIED:
                ways["copies"] = punica(lora.lora_a, expand, depth - 1, x)
            times = measured(linear, x, ways, given.rounds)
            alone = times.pop("alone")
            ratios = {name: seconds / alone for name, seconds in times.items()}
            results.append({"rows": count, "mixed": mixed, "ratios": ratios})
    show(results)
    finish({**report, "size": size, "rank": rank, "loops": loops, "results": results}, given.write)


def with_rows(
    lora: LoRAByDepth, depths: Depths, rows: RowsByDepth, x: torch.Tensor
) -> Callable[[torch.Tensor], Any]:
    def add(y: torch.Tensor) -> None:
        depths.rows = rows
        lora.add(y, x)

    return add


def punica(
    a: torch.Tensor, b: torch.Tensor, index: torch.Tensor, x: torch.Tensor
) -> Callable[[torch.Tensor], Any]:
    def add(y: torch.Tensor) -> None:
        shrunk = x.new_empty(len(x), a.shape[1])
        bgmv_shrink(x, a, shrunk, index)
        bgmv_expand(shrunk, b, y, index)

    return add


@torch.inference_mode()
def measured(
    linear: nn.Module,
    x: torch.Tensor,
    ways: dict[str, Callable[[torch.Tensor], Any]],
    rounds: int,
) -> dict[str, float]:
    """Seconds of the layer with each addition, in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            way(linear(x))
            began = time.perf_counter()
            for _ in range(5):
                way(linear(x))
            times[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in times.items()}


def show(results: list[dict[str, Any]]) -> None:
    table = Table("rows", "depths", "grouped", "masked", "copies")
    for result in results:
        ratios = (
            f"{result['ratios'].get(name, 0):.2f}" for name in ("grouped", "masked", "copies")
        )
        table.add_row(str(result["rows"]), "all" if result["mixed"] else "one", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
