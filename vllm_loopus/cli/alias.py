"""`vllm-loopus alias`: manages short names for LoopUS checkpoints."""

from typing import Annotated

import typer

from vllm_loopus import aliases
from vllm_loopus.cli.output import JsonOption, print_json, print_table, report_errors

alias_app = typer.Typer(name="alias", help="Short names for checkpoints.", no_args_is_help=True)


@alias_app.command("list")
def list_aliases(as_json: JsonOption = False) -> None:
    """List all aliases, their targets and origins."""
    with report_errors(aliases.AliasError, OSError):
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
        print_json(rows)
        return
    print_table(
        ("alias", "target", "from"), [[cell or "-" for cell in row.values()] for row in rows]
    )


@alias_app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="The alias, for example loopus-qwen3-4b.")],
    target: Annotated[str, typer.Argument(help="A checkpoint folder, or owner/name on the hub.")],
    as_json: JsonOption = False,
) -> None:
    """Register an alias. It takes precedence over an embedded or published one."""
    with report_errors(aliases.AliasError, OSError):
        aliases.add_alias(name, target)
        leads_to = aliases.known_aliases()[name]
    if as_json:
        print_json({"name": name, "target": leads_to})
    else:
        typer.echo(f"{name} -> {leads_to}")


@alias_app.command("remove")
def remove(
    name: Annotated[
        str, typer.Argument(help="One of your aliases.", autocompletion=lambda: list(_own()))
    ],
    as_json: JsonOption = False,
) -> None:
    """Remove one of your aliases."""
    with report_errors(aliases.AliasError, OSError):
        aliases.remove_alias(name)
    if as_json:
        print_json({"name": name, "target": None})
    else:
        typer.echo(f"{name} removed")


def _own() -> dict[str, str]:
    """The user's aliases, for shell completion; empty if their file is damaged."""
    try:
        return aliases.user_aliases()
    except aliases.AliasError:
        return {}


def _origin(name: str, own: dict[str, str]) -> str:
    if name in own:
        return "you"
    return "embedded" if name in aliases.EMBEDDED else "published"
