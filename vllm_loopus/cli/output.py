"""Functions that the subcommands share: output as JSON or table, errors, exit codes.

Exit codes: 0 done; 1 a problem was found (`doctor`, `trace`, `batch`, `bench`); 2 the input is
wrong, including errors reported by typer; 130 interrupted with Ctrl-C (`eval`, `batch`, `train`).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from vllm_loopus.extras import MissingExtraError

PROBLEM, BAD_INPUT, INTERRUPTED = 1, 2, 130
PICTURES = (".png", ".svg", ".pdf")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@contextmanager
def report_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Prints errors of these kinds and missing libraries as one line on standard error, and exits
    with code 2."""
    reported: tuple[type[Exception], ...] = (MissingExtraError, *kinds)
    try:
        yield
    except reported as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Prints a table; outside a terminal it is not wrapped."""
    table = Table(*(Column(as_text(column)) for column in columns))
    for row in rows:
        table.add_row(*map(as_text, row))
    console = Console()
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
        console = Console(width=max(needed, console.width))
    console.print(table)


def as_text(cell: str | Text) -> Text:
    """A cell as text without markup or control characters, which names of a checkpoint may have."""
    if isinstance(cell, Text):
        return cell
    shown = (c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in cell)
    return Text("".join(shown))


def check_writable(file: Path) -> None:
    """Raises `ValueError` if a file cannot be written."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written; name a file in an existing folder")


def check_picture(file: Path) -> None:
    """Raises `ValueError` if a picture cannot be written or its format is unknown."""
    check_writable(file)
    if file.suffix not in PICTURES:
        raise ValueError(f"{file} is not a picture; its name must end in {', '.join(PICTURES)}")


def json_object(name: str, text: str) -> dict[str, Any]:
    """Parses an option that is a JSON object. Raises `ValueError` that names it."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name}={text!r} must be a JSON object")
    return value


def absolute(target: str) -> str:
    """The absolute path of a folder, for processes with another working folder; other names are
    returned unchanged."""
    return str(Path(target).resolve()) if Path(target).exists() else target
