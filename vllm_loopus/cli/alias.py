"""`vllm-loopus alias`: short names for LoopUS checkpoints."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_loopus import aliases

alias_app = typer.Typer(name="alias", help="Short names for checkpoints.", no_args_is_help=True)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def _errors_told() -> Iterator[None]:
    """An `AliasError` becomes a line on standard error and exit code 2."""
    try:
        yield
    except aliases.AliasError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@alias_app.command("list")
def list_aliases(as_json: JsonOption = False) -> None:
    """Every alias, where it leads, and who says so."""
    with _errors_told():
        own = aliases.user_aliases()
        known = aliases.known_aliases()
    rows: list[dict[str, str | None]] = [
        {"name": name, "target": target, "from": _origin(name, own)}
        for name, target in sorted(known.items())
    ]
    rows += [
        {"name": name, "target": None, "from": f"none published; recast {base}"}
        for name, base in sorted(aliases.UNPUBLISHED.items())
        if name not in known
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("alias", "leads to", "from")
    for row in rows:
        table.add_row(*(cell or "-" for cell in row.values()))
    Console().print(table)


@alias_app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="The alias, for example loopus-qwen3-4b.")],
    target: Annotated[str, typer.Argument(help="A checkpoint folder, or owner/name on the hub.")],
) -> None:
    """Register an alias. It wins over an embedded or published one of the same name."""
    with _errors_told():
        aliases.add_alias(name, target)
    typer.echo(f"{name} -> {aliases.known_aliases()[name]}")


@alias_app.command("remove")
def remove(name: Annotated[str, typer.Argument(help="An alias of yours.")]) -> None:
    """Forget an alias of yours."""
    with _errors_told():
        aliases.remove_alias(name)
    typer.echo(f"{name} removed")


def _origin(name: str, own: dict[str, str]) -> str:
    if name in own:
        return "you"
    return "embedded" if name in aliases.EMBEDDED else "published"
