"""How long a pass of the reasoning block takes by its rows, beside the time to read its weights.

    python -m measures.passes --size 4b [--graphs]

With `--graphs` a replayed pass must give the states of an eager one.
"""

import tempfile
from pathlib import Path

import torch

from measures.engines import SHAPES, about, build_shape, runner_of
from measures.machine import copy_bandwidth, median_seconds
from measures.one_pass import OnePass, difference
from measures.program import end, parser, saying

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the greatest value


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=SHAPES, default="4b")
    options.add_argument("--rows", type=int, nargs="+", default=[16, 1, 64, 256, 4])
    options.add_argument("--graphs", action="store_true")
    given = options.parse_args()
    size, rows = ("tiny", [3, 1]) if given.tiny else (given.size, given.rows)
    repeats = 3 if given.tiny else 30
    say = saying(given)
    with tempfile.TemporaryDirectory() as folder:
        llm = build_shape(size, Path(folder), given.graphs, max_num_seqs=max(rows))
    runner = runner_of(llm)
    dtype: torch.dtype = runner.vllm_config.model_config.dtype
    bandwidth = copy_bandwidth(2**20 if given.tiny else 2**30)
    floor = SHAPES[size].pass_weights * dtype.itemsize / bandwidth
    say(
        size=size,
        floor_ms=1e3 * floor,
        copy_bytes_s=bandwidth,
        **about(llm),
    )
    same = True
    for count in rows:
        one = OnePass.of(runner, count)
        eager = median_seconds(lambda one=one: one(padded=False), repeats)  # type: ignore[misc]
        found = {"rows": count, "eager_ms": 1e3 * eager, "eager_over_floor": eager / floor}
        if given.graphs:
            expected = tuple(output.clone() for output in one(padded=False))
            apart = difference(one(), expected)
            same &= apart <= CLOSE[dtype]
            replayed = median_seconds(one, repeats)
            found |= {
                "graph_ms": 1e3 * replayed,
                "graph_over_floor": replayed / floor,
                "difference": apart,
            }
        say(**found)
    end(same)


if __name__ == "__main__":
    main()
