"""`vllm-loopus train`: post-trains a LoopUS model, or trains a plain model as a control."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vllm_loopus.cli.output import INTERRUPTED, JsonOption, print_json, print_table, report_errors


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; configs/ has examples.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")
    ] = False,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override KEY=VALUE, such as supervision.beta=0.5; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Post-train a LoopUS model or a recursive transformer, configured by a YAML file.

    On several GPUs or machines: accelerate launch -m vllm_loopus.cli train CONFIG.
    """
    with report_errors(ValueError, OSError, ImportError, FloatingPointError):
        from vllm_loopus.training.settings import read_settings

        settings = read_settings(config, override or ())
        from vllm_loopus.training.run import InterruptedRunError  # slow to import
        from vllm_loopus.training.run import train as run

        try:
            summary = run(settings, resume)
        except InterruptedRunError as interruption:
            typer.echo(f"\n{interruption}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except KeyboardInterrupt:
            typer.echo("\ninterrupted before training began; nothing is lost", err=True)
            raise typer.Exit(INTERRUPTED) from None
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(asdict(summary))
        return
    rows = [
        ("tokens", f"{summary.tokens:,}"),
        ("batches", f"{summary.batches:,}"),
        ("updates", f"{summary.updates:,}"),
        ("time", f"{summary.seconds:,.1f} s"),
        *(
            (name, f"{value:.4f}")
            for name, value in summary.metrics.items()
            if "_threshold_" not in name
        ),
    ]
    print_table(("trained", ""), rows)
    if summary.suggestion is not None:
        typer.echo(summary.suggestion)
    typer.echo(f"{summary.model}: vllm serve {summary.model}")
