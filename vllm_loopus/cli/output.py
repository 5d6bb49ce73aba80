"""What the subcommands share: JSON or a table, errors as one line, exit codes.

Exit codes: 0 done; 1 a problem was found (`doctor`, `trace`, `batch`, `bench`); 2 the input is
wrong, also when typer says so; 130 stopped with Ctrl-C (`eval`, `batch`).
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
def errors_told(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, and libraries that are not installed, become a line on standard error
    and exit code 2."""
    told: tuple[type[Exception], ...] = (MissingExtraError, *kinds)
    try:
        yield
    except told as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
    """Outside a terminal as wide as the table is."""
    table = Table(*(Column(as_text(column)) for column in columns))
    for row in rows:
        table.add_row(*map(as_text, row))
    console = Console()
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
        console = Console(width=max(needed, console.width))
    console.print(table)


def as_text(cell: str | Text) -> Text:
    """A cell as it is: names of a checkpoint are no markup, and do not move a terminal's cursor."""
    if isinstance(cell, Text):
        return cell
    shown = (c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in cell)
    return Text("".join(shown))


def check_writable(file: Path) -> None:
    """Raises `ValueError` for a file that cannot be written, before work for it starts."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written; name a file in a folder that exists")


def check_picture(file: Path) -> None:
    """Raises `ValueError` for a picture's file that cannot be written, or of an unknown kind."""
    check_writable(file)
    if file.suffix not in PICTURES:
        raise ValueError(f"{file} is no picture: its name must end in {', '.join(PICTURES)}")


def json_object(name: str, text: str) -> dict[str, Any]:
    """An option that is a JSON object. Raises `ValueError` naming it."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name}={text!r} must be a JSON object")
    return value


def absolute(target: str) -> str:
    """A folder's full path, for processes in other working folders; other names as they are."""
    return str(Path(target).resolve()) if Path(target).exists() else target
