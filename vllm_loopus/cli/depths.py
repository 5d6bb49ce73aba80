"""`vllm-loopus depths`: statistics of the exit depths in a saved run."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_loopus.cli.info import known_models, load_config, resolve
from vllm_loopus.cli.output import JsonOption, check_picture, print_json, report_errors

if TYPE_CHECKING:
    from vllm_loopus.trace.tokens import Vocabulary


def depths(
    run: Annotated[
        Path,
        typer.Argument(
            help="JSON lines: answers of a server, the output of a batch, lines of a script with "
            "exit_depths, or the output of `trace --json`."
        ),
    ],
    by: Annotated[
        str | None,
        typer.Option(
            help="Field to group answers by, a.b for a nested field. Default: difficulty or label."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model of the token_ids, for token classes.", autocompletion=known_models
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer of --model, if it has none.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--png", help="Draw the statistics (PNG, SVG, PDF).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the exit depths of a saved run by position, token class and difficulty."""
    from vllm_loopus.trace.runs import read
    from vllm_loopus.trace.workload import statistics

    with report_errors(ValueError, OSError):
        if picture is not None:
            check_picture(picture)
        found = statistics(read(run, _vocabulary(model, tokenizer), by))
        if picture is not None:
            from vllm_loopus.trace import pictures  # imports matplotlib

            pictures.save(pictures.draw_workload(found, run.name), picture)
    if as_json:
        print_json(found)
    else:
        _print(found)


def _vocabulary(model: str | None, tokenizer: str | None) -> "Vocabulary | None":
    if model is None:
        if tokenizer is not None:
            raise ValueError("--tokenizer needs --model")
        return None
    from vllm_loopus.trace.reference import load_vocabulary

    vocabulary = load_vocabulary(resolve(model), load_config(model), tokenizer)
    if vocabulary.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; give --tokenizer")
    return vocabulary


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vllm_loopus.trace.tokens import UNKNOWN, visible

    console = Console()
    groups = {"all": [found["overall"]], **found["groups"]}
    for name, rows in groups.items():
        if not rows:
            continue
        table = Table(name, "tokens", "mean", "± s.e.", "median", "10 % to 90 %", "share by depth")
        for row in rows:
            error, quantiles = row["standard_error"], row["quantiles"]
            table.add_row(
                Text(visible(row["group"])),
                str(row["tokens"]),
                f"{row['mean']:.2f}",
                "" if error is None else f"{error:.2f}",
                f"{quantiles['0.5']:g}",
                f"{quantiles['0.1']:g} to {quantiles['0.9']:g}",
                _shares(row),
            )
        console.print(table)
    classes = {row["group"]: row["tokens"] for row in found["groups"]["token class"]}
    if UNKNOWN in classes:
        typer.echo(
            f"{classes[UNKNOWN]} of {found['overall']['tokens']} tokens have no known text; "
            "give --model and lines with token_ids",
            err=True,
        )


def _shares(row: dict[str, Any]) -> str:
    """The shares of tokens by exit depth, as bars in steps of 1/8."""
    bars = " ▁▂▃▄▅▆▇█"
    shares = [count / row["tokens"] for count in row["by_depth"].values()]
    return "".join(bars[math.ceil(8 * share)] for share in shares)
