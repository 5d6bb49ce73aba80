"""What would compiling bring? A pass as it is and under `torch.compile`, both as a CUDA graph.

    python -m measures.compiled --size 4b

The pass is to be compiled only if this shows more than 5 %. On a CPU both run without a graph.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from measures.engines import SHAPES, build_shape, runner_of
from measures.machine import median_seconds
from measures.one_pass import OnePass, difference
from measures.program import end, parser, saying

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the greatest value; fusing rounds less


def replayed(one: OnePass) -> tuple[Callable[[], Any], tuple[torch.Tensor, ...]]:
    """What runs the pass, as a graph where there are graphs, and the outputs it writes."""
    if not torch.cuda.is_available():
        return one.compute, one.compute()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one.compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = one.compute()
    graph.replay()
    return graph.replay, outputs


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=SHAPES, default="4b")
    options.add_argument("--rows", type=int, nargs="+", default=[16, 64, 1])
    given = options.parse_args()
    size, rows = ("tiny", [3]) if given.tiny else (given.size, given.rows)
    repeats, say, same = 3 if given.tiny else 50, saying(given), True
    with tempfile.TemporaryDirectory() as folder:
        llm = build_shape(size, Path(folder), graphs=False, max_num_seqs=max(rows))
    runner = runner_of(llm)
    reasoning = runner.get_model().reasoning
    found: dict[int, tuple[float, tuple[torch.Tensor, ...]]] = {}
    for kind in ("as it is", "compiled"):
        if kind == "compiled":
            reasoning.compile(dynamic=False)  # a size at a time: what it could bring at best
        for count in rows:
            one = OnePass.of(runner, count)
            with one.attention():
                call, outputs = replayed(one)
                kept = tuple(output.clone() for output in outputs)
                seconds = median_seconds(call, repeats)
            if kind == "as it is":
                found[count] = seconds, kept
                continue
            before, expected = found[count]
            apart = difference(kept, expected)
            same &= apart <= CLOSE[runner.vllm_config.model_config.dtype]
            say(
                size=size,
                rows=count,
                ms=1e3 * before,
                compiled_ms=1e3 * seconds,
                gain=before / seconds - 1,
                difference=apart,
            )
    end(same)


if __name__ == "__main__":
    main()
