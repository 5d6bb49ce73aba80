"""`vllm-loopus bench`: engines side by side on this machine."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_loopus.cli.output import PROBLEM, JsonOption, errors_told, print_json, print_table

if TYPE_CHECKING:
    from vllm_loopus.bench.setup import Setup

TERMINATED = 128 + signal.SIGTERM
SCRATCH = "VLLM_LOOPUS_BENCH_SCRATCH"
OUT = Path("bench-results")


class BenchPlan(StrEnum):
    """How much is measured."""

    FULL = "full"
    QUICK = "quick"
    TINY = "tiny"


class BenchDtype(StrEnum):
    """What to compute in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def bench(
    plan: Annotated[
        BenchPlan,
        typer.Option(help="quick: about 15 minutes on two cores; tiny: a small model, to try it."),
    ] = BenchPlan.FULL,
    only: Annotated[
        str | None, typer.Option(help="Sections with commas: machine, decode, sweep, mixed, ...")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help=f"Folder for the report; {OUT} where something is measured."
        ),
    ] = None,
    dtype: Annotated[
        BenchDtype,
        typer.Option(
            help="auto: bfloat16 where the machine has instructions for it, else float32."
        ),
    ] = BenchDtype.AUTO,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="For the measuring; more rounds in more minutes.")
    ] = None,
    seqs: Annotated[str | None, typer.Option(help="Sequences at a time, with commas.")] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="A checkout of the original implementation."
        ),
    ] = None,
    original_python: Annotated[
        str, typer.Option(help="The Python that runs it, with transformers of its time.")
    ] = sys.executable,
    into: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Markdown file to write the table into."),
    ] = None,
    saved: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: a report that is there already.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Report of an earlier run, to hold the ratios against.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure engines side by side; ratios with their spread, against ideal and simulation.

    Writes report.json, report.html and report.png. Exit code 1 where a section failed and, with
    --compare, where spreads of the two runs do not overlap.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Stopped from outside, engines and servers are to end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    from vllm_loopus.bench import figures, report
    from vllm_loopus.bench.process import WorkerError
    from vllm_loopus.bench.run import run
    from vllm_loopus.bench.setup import about

    folder_of_run = out or OUT
    if saved is None:
        out = folder_of_run
    with errors_told(ValueError, OSError):
        earlier = report.read(compare) if compare else None
        if into is not None:
            figures.place_in(into)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    if saved is not None:
        with errors_told(ValueError):
            found = report.read(saved)
            if earlier is not None:
                figures.raise_if_incomparable(found, earlier)
    else:
        with tempfile.TemporaryDirectory(dir=os.environ.get(SCRATCH)) as folder:
            with errors_told(ValueError, OSError):
                setup = _setup(plan, only, dtype, minutes, seqs, original, original_python, folder)
                if earlier is not None:
                    figures.raise_if_incomparable(about(setup, ()), earlier)
            try:
                found = run(
                    setup,
                    ["vllm-loopus", *sys.argv[1:]],
                    lambda part: report.keep(part, folder_of_run),
                )
            except WorkerError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(PROBLEM) from error
    with errors_told(ValueError, OSError):
        if out is not None:
            report.write(found, out)
        if into is not None:
            figures.write_into(into, found)
        rows = figures.agreement(found, earlier) if earlier is not None else []
    if as_json:
        print_json(found)
    else:
        _print(found, rows, out)
    for name, reason in found["failed"].items():
        typer.echo(f"failed: {name}: {reason.splitlines()[-1]}", err=True)
    if found["failed"] or any(row[-1] == figures.AGREES[False] for row in rows):
        raise typer.Exit(PROBLEM)


def _setup(
    plan: BenchPlan,
    only: str | None,
    dtype: BenchDtype,
    minutes: float | None,
    seqs: str | None,
    original: Path | None,
    original_python: str,
    folder: str,
) -> "Setup":
    """Raises `ValueError` for options that cannot be."""
    from vllm_loopus.bench.setup import ALL, PLANS, Setup, default_device, default_dtype

    chosen = PLANS[plan.value]
    if only is not None:
        wanted = [name.strip() for name in only.split(",") if name.strip()]
        if unknown := [name for name in wanted if name not in ALL] or not wanted:
            raise ValueError(f"only={only!r} names {unknown}; sections are {', '.join(ALL)}")
        if "served" in wanted and "decode" not in wanted:
            raise ValueError(
                f"only={only!r}: the rate that served asks at follows from decode; add it"
            )
        chosen = replace(chosen, sections=tuple(wanted))
    if seqs is not None:
        numbers = seqs.split(",")
        if not all(number.strip().isdigit() and int(number) for number in numbers):
            raise ValueError(f"seqs={seqs!r} must be whole numbers above 0, with commas")
        chosen = replace(chosen, seqs=tuple(sorted({int(number) for number in numbers})))
    if minutes is not None:
        chosen = replace(chosen, minutes=minutes)
    if original is not None and not (original / "models" / "modeling_lds.py").is_file():
        raise ValueError(
            f"original={original} is no checkout of the original implementation: it has no "
            "models/modeling_lds.py"
        )
    if original is not None and shutil.which(original_python) is None:
        raise ValueError(f"original_python={original_python!r} is no program; name a Python")
    device = default_device()
    return Setup(
        plan=chosen,
        folder=Path(folder),
        dtype=default_dtype(device) if dtype is BenchDtype.AUTO else dtype.value,
        device=device,
        tell=lambda line: typer.echo(line, err=True),
        original=None if original is None else (original.resolve(), original_python),
    )


def _print(found: dict[str, Any], agreement: Sequence[Sequence[str]], out: Path | None) -> None:
    from vllm_loopus.bench import figures

    told = figures.figures(found)
    print_table(figures.HEADS, [figure.cells() for figure in told])
    for figure in told:
        if figure.note:
            typer.echo(f"{figure.name}: {figure.note}")
    typer.echo(f"\n{figures.headline(found)}")
    if out is not None:
        typer.echo(str(out / "report.html"))
    if agreement:
        print_table(("figure", "this run", "the earlier one", "spreads overlap"), agreement)
