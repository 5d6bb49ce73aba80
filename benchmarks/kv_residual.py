"""How long does it take to decode K/V that is stored as differences, over attention itself?

For whoever wonders why `kv_planes` has no `residual`; docs/kv-layout.md has the numbers.

    python benchmarks/kv_residual.py                    # CPU, one layer: half a minute

A pass at depth r attends to K/V that is plane 1 plus the differences of planes 2 to r: 2 bits a
number, with a least value and a step for each token and head. vLLM's attention kernels read pages
of one dtype, so the sum has to be in such pages before. Two ways: all differences at each pass; or
one, added to pages that hold the sum of the pass before, a plane more for each running sequence.
Decoding is plain torch over all positions of all sequences, threads as torch has them.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.serving.model.cpu_kernels import permit_tiles

BLOCK = 128
SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)


class Differences:
    """One plane of differences of K or V: [tokens, heads, size] numbers."""

    def __init__(self, tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
        shape = tokens, heads, size // 4
        self.packed = torch.randint(0, 256, shape, dtype=torch.uint8)
        self.least = torch.randn(tokens, heads, 1).to(dtype)
        self.step = torch.rand(tokens, heads, 1).to(dtype)

    def add_to(self, numbers: torch.Tensor) -> torch.Tensor:
        """`numbers` [tokens, heads, size] with the differences added, in place."""
        steps = (self.packed[..., None] >> SHIFTS).bitwise_and_(3).flatten(-2)
        return numbers.addcmul_(steps.to(numbers.dtype), self.step).add_(self.least)


def seconds(run: Callable[[], Any], rounds: int) -> float:
    taken = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return median(taken[2:])


def attention(
    seqs: int, context: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> Callable[[], Any]:
    """One layer's attention of one new position of each sequence, by vLLM's CPU kernel."""
    blocks = -(-context // BLOCK)
    isa = _get_attn_isa(dtype, BLOCK, size, "auto")
    cache = torch.randn(seqs * blocks, kv_heads, 2 * BLOCK, size).to(dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    query = torch.randn(seqs, heads, size).to(dtype)
    starts = torch.arange(seqs + 1, dtype=torch.int32)
    lengths = torch.full((seqs,), context, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=seqs, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, seq_lens=lengths,
        dtype=dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=True, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    return lambda: ops.cpu_attention_with_kv_cache(
        query=query, key_cache=key_cache, value_cache=value_cache, output=torch.empty_like(query),
        query_start_loc=starts, seq_lens=lengths, scale=size**-0.5, causal=True,
        alibi_slopes=None, sliding_window=-1,
        block_table=torch.arange(seqs * blocks, dtype=torch.int32).view(seqs, blocks),
        softcap=0, scheduler_metadata=plan, s_aux=None, dynamic_causal=None, k_scale=1.0,
        v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip


def measure(args: Any, context: int) -> dict[str, float]:
    dtype, tokens = torch.bfloat16, args.seqs * context
    shape = tokens, args.kv_heads, args.head_size
    attend = attention(args.seqs, context, args.heads, args.kv_heads, args.head_size, dtype)
    first = torch.randn(2, *shape).to(dtype)
    planes = [
        [Differences(*shape, dtype) for _ in range(2)] for _ in range(args.depth - 1)
    ]  # K and V

    def one() -> None:
        for side, differences in zip(first, planes[0], strict=True):
            differences.add_to(side)

    def every() -> None:
        sums = first.clone()
        for plane in planes:
            for side, differences in zip(sums, plane, strict=True):
                differences.add_to(side)

    taken = {name: seconds(run, args.rounds) for name, run in
             {"attention": attend, "one": one, "every": every}.items()}  # fmt: skip
    return {"context": context, **taken}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seqs", type=int, default=16)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    report = begin()
    permit_tiles()
    rows = [measure(args, context) for context in args.contexts]
    print(f"{args.seqs} sequences, one layer; times the attention\n")
    print("| context | attention, ms | one difference | all differences |\n|---|---|---|---|")
    for row in rows:
        one, every = row["one"] / row["attention"], row["every"] / row["attention"]
        print(f"| {row['context']} | {1e3 * row['attention']:.2f} | {one:.1f} | {every:.1f} |")
    finish({**report, "rows": rows}, args.write)


if __name__ == "__main__":
    main()
