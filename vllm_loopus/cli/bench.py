"""`vllm-loopus bench`: compares engines on this machine."""

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

from vllm_loopus.cli.output import PROBLEM, JsonOption, print_json, print_table, report_errors

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


class BenchShape(StrEnum):
    """Architectures of the model that is measured."""

    LOOPUS = "loopus"
    OURO = "ouro"


class BenchDtype(StrEnum):
    """Dtypes to compute in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def bench(
    plan: Annotated[
        BenchPlan,
        typer.Option(help="quick: about 15 minutes on two cores; tiny: a tiny model, for a try."),
    ] = BenchPlan.FULL,
    shape: Annotated[
        BenchShape, typer.Option(help="Architecture of the model that is measured.")
    ] = BenchShape.LOOPUS,
    only: Annotated[
        str | None, typer.Option(help="Sections, separated by commas: machine, decode, sweep, ...")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help=f"Folder for the report. Default: {OUT}; none with --from."
        ),
    ] = None,
    dtype: Annotated[
        BenchDtype,
        typer.Option(help="auto: bfloat16 if the machine has instructions for it, else float32."),
    ] = BenchDtype.AUTO,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Time for measuring; more time gives more rounds.")
    ] = None,
    seqs: Annotated[
        str | None, typer.Option(help="Numbers of concurrent sequences, separated by commas.")
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="A checkout of the original implementation."
        ),
    ] = None,
    original_python: Annotated[
        str, typer.Option(help="The Python for --original, with the transformers that it needs.")
    ] = sys.executable,
    into: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Markdown file to insert the table into."),
    ] = None,
    saved: Annotated[
        Path | None, typer.Option("--from", help="Show an existing report; measure nothing.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Report of an earlier run to compare the ratios with.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure engines in turn, and compare their ratios with the ideal and a simulation.

    Writes report.json, report.html and report.png. Exit code 1 if a section failed or, with
    --compare, if the spreads of the two runs do not overlap.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Ends engines and servers too when the command is terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    from vllm_loopus.bench import figures, report
    from vllm_loopus.bench.process import WorkerError
    from vllm_loopus.bench.run import run
    from vllm_loopus.bench.setup import about

    folder_of_run = out or OUT
    if saved is None:
        out = folder_of_run
    with report_errors(ValueError, OSError):
        earlier = report.read(compare) if compare else None
        if into is not None:
            figures.place_in(into)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    if saved is not None:
        with report_errors(ValueError):
            found = report.read(saved)
            if earlier is not None:
                figures.raise_if_incomparable(found, earlier)
    else:
        with tempfile.TemporaryDirectory(dir=os.environ.get(SCRATCH)) as folder:
            with report_errors(ValueError, OSError):
                setup = _setup(
                    plan, shape, only, dtype, minutes, seqs, original, original_python, folder
                )
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
    with report_errors(ValueError, OSError):
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
    shape: BenchShape,
    only: str | None,
    dtype: BenchDtype,
    minutes: float | None,
    seqs: str | None,
    original: Path | None,
    original_python: str,
    folder: str,
) -> "Setup":
    """The setup of the run. Raises `ValueError` for invalid options."""
    from vllm_loopus.bench.setup import ALL, PLANS, Setup, default_device, default_dtype

    chosen = PLANS[plan.value]
    if shape is BenchShape.OURO:
        chosen = replace(chosen, size="ouro-tiny" if plan is BenchPlan.TINY else "ouro", mean=2.0)
    known = [name for name in ALL if name not in chosen.model.left_out]
    chosen = replace(chosen, sections=tuple(name for name in chosen.sections if name in known))
    if only is not None:
        wanted = [name.strip() for name in only.split(",") if name.strip()]
        if not wanted:
            raise ValueError(f"only={only!r} names no section; sections are {', '.join(known)}")
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(
                f"only={only!r} has unknown sections {unknown}; sections are {', '.join(known)}"
            )
        if "served" in wanted and "decode" not in wanted:
            raise ValueError(
                f"only={only!r}: the request rate of served depends on decode; add decode"
            )
        chosen = replace(chosen, sections=tuple(wanted))
    if seqs is not None:
        numbers = seqs.split(",")
        if not all(number.strip().isdigit() and int(number) for number in numbers):
            raise ValueError(f"seqs={seqs!r} must be positive whole numbers, separated by commas")
        chosen = replace(chosen, seqs=tuple(sorted({int(number) for number in numbers})))
    if minutes is not None:
        chosen = replace(chosen, minutes=minutes)
    if original is not None and not (original / "models" / "modeling_lds.py").is_file():
        raise ValueError(
            f"original={original} is not a checkout of the original implementation: it has no "
            "models/modeling_lds.py"
        )
    if original is not None and shutil.which(original_python) is None:
        raise ValueError(f"original_python={original_python!r} is not a program; give a Python")
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

    shown = figures.figures(found)
    print_table(figures.HEADS, [figure.cells() for figure in shown])
    for figure in shown:
        if figure.note:
            typer.echo(f"{figure.name}: {figure.note}")
    typer.echo(f"\n{figures.headline(found)}")
    if out is not None:
        typer.echo(str(out / "report.html"))
    if agreement:
        print_table(("figure", "this run", "earlier run", "spreads overlap"), agreement)
