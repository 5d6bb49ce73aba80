"""Does `vllm-loopus recast` need more memory for a large checkpoint than for a small one?

For developers who change how weights are read or written; docs/recast.md has the numbers.

    python benchmarks/recast_memory.py                  # 2 GB, cut by hand: two minutes
    python benchmarks/recast_memory.py --analysis       # and its hidden states analysed: longer

Prints the peak resident memory on a sharded checkpoint, beside that on loopus-tiny-base. Weights
are random and of no use; what counts is their size.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import BooleanOptionalAction
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.bench.models import ModelSize
from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.tiny.tokenizer import build_tokenizer

SMALL = "loopus-tiny-base"
LARGE = ModelSize(hidden=2048, intermediate=6144, heads=16, kv_heads=8, head_size=128, longest=2048)


@dataclass(frozen=True)
class Peak:
    """What one recast took: resident bytes at most, and seconds."""

    checkpoint: str
    checkpoint_bytes: int
    peak_bytes: int
    seconds: float


def of_size(gigabytes: float) -> ModelSize:
    """A model whose weights in bf16 take about so many GiB."""
    outside = 2 * LARGE.head_weights  # embedding and LM head
    return replace(LARGE, layers=max(3, round((gigabytes * 2**29 - outside) / LARGE.layer_weights)))


def make_checkpoint(folder: Path, size: ModelSize, shard_size: str) -> None:
    """A random bf16 model in shards, with a tokenizer."""
    config = AutoConfig.for_model(**size.base_config())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard_size)
    build_tokenizer().save_pretrained(folder)


def recast(name: str, base: Path, out: Path, *options: str) -> Peak:
    """One `vllm-loopus recast`, a process of its own. Raises `RuntimeError` where it fails."""
    command = [sys.executable, "-m", "vllm_loopus.cli", "recast", str(base), "--out", str(out)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # waited for already
    if process.returncode:
        raise RuntimeError(errors.decode()[-2000:])
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return Peak(name, weights, usage.ru_maxrss * 1024, time.perf_counter() - started)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--shard-size", default="500MB", help="of its files")
    parser.add_argument(
        "--analysis",
        action=BooleanOptionalAction,
        default=False,
        help="analyse the hidden states as well",
    )
    args = parser.parse_args()
    size = of_size(args.gigabytes)

    def cut(layers: int) -> tuple[str, ...]:
        """Options for one layer in the encoder and one in the decoder."""
        by_hand = ("--no-analysis", "--encoder", "0", "--decoder", str(layers - 1))
        return () if args.analysis else by_hand

    report = begin()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # In a process of its own: the peak of a process counts what its parent held at the fork.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(make_checkpoint, work / "base", size, args.shard_size).result()
        small = recast(SMALL, EMBEDDED[SMALL], work / "small", *cut(4))
        name = f"synthetic, shards of {args.shard_size}"
        large = recast(name, work / "base", work / "large", *cut(size.layers))
    table = Table("checkpoint", "size MB", "peak RSS MB", "more than the small one MB", "seconds")
    for peak in (small, large):
        more = "-" if peak is small else f"{(peak.peak_bytes - small.peak_bytes) / 1e6:.0f}"
        table.add_row(
            peak.checkpoint,
            f"{peak.checkpoint_bytes / 1e6:.1f}",
            f"{peak.peak_bytes / 1e6:.0f}",
            more,
            f"{peak.seconds:.1f}",
        )
    Console().print(table)
    finish({**report, "peaks": [asdict(small), asdict(large)]}, args.write)


if __name__ == "__main__":
    main()
