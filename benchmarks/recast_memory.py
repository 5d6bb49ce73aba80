"""Peak memory of `vllm-loopus recast` on a large sharded checkpoint, beside that on a small one.

    python benchmarks/recast_memory.py                  # 2 GB, cut by hand, no analysis
    python benchmarks/recast_memory.py --analysis       # with the analysis of its hidden states

Weights are random and of no use; what counts is their size.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_loopus.tiny.tokenizer import build_tokenizer

LAYER_BYTES = 2 * (2048 * 2048 * 3 + 3 * 2048 * 6144)


def make_checkpoint(folder: Path, gigabytes: float, shard_size: str) -> int:
    """A random bf16 Qwen3 model of about this size, in shards; returns its bytes."""
    vocabulary = 32_000
    layers = round((gigabytes * 2**30 - 2 * 2 * vocabulary * 2048) / LAYER_BYTES)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=max(3, layers),
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    Qwen3ForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
    build_tokenizer().save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak_of_recast(base: str, out: Path, *options: str) -> tuple[int, float]:
    """Peak resident bytes and seconds of one `vllm-loopus recast`, a process of its own."""
    command = Path(sys.executable).with_name("vllm-loopus")
    started = time.perf_counter()
    arguments = [str(command), "recast", base, "--out", str(out), *options]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # waited for already
    if process.returncode:
        raise RuntimeError(errors.decode()[-2000:])
    return usage.ru_maxrss * 1024, time.perf_counter() - started


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint.")] = 2.0,
    shard_size: Annotated[str, typer.Option(help="Of its files.")] = "500MB",
    analysis: Annotated[bool, typer.Option(help="Analyse the hidden states as well.")] = False,
) -> None:
    """Measure, and print a table."""
    table = Table("checkpoint", "size MB", "peak RSS MB", "over the small one MB", "seconds")
    options = () if analysis else ("--no-analysis", "--encoder", "0")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # In a process of its own: the peak of a process counts what its parent held at the fork.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            size = pool.submit(make_checkpoint, work / "base", gigabytes, shard_size).result()
        last = _num_layers(work / "base") - 1
        small_options = (*options, "--decoder", "3") if options else ()
        small, taken = peak_of_recast("loopus-tiny-base", work / "small", *small_options)
        table.add_row("loopus-tiny-base", "2", f"{small / 1e6:.0f}", "-", f"{taken:.1f}")
        large_options = (*options, "--decoder", str(last)) if options else ()
        large, taken = peak_of_recast(str(work / "base"), work / "large", *large_options)
        table.add_row(
            f"synthetic, shards of {shard_size}",
            f"{size / 1e6:.0f}",
            f"{large / 1e6:.0f}",
            f"{(large - small) / 1e6:.0f}",
            f"{taken:.1f}",
        )
    Console().print(table)


def _num_layers(folder: Path) -> int:
    return int(Qwen3Config.from_pretrained(folder).num_hidden_layers)


if __name__ == "__main__":
    typer.run(main)
