"""`vllm-loopus doctor`: checks whether serving works here, and suggests fixes."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from vllm_loopus.cli.checks import ERROR, Finding, examine
from vllm_loopus.cli.info import known_models
from vllm_loopus.cli.output import PROBLEM, JsonOption, print_json, print_table

STYLES = {"ok": "[green]ok[/]", "note": "[cyan]note[/]", "warning": "[yellow]warning[/]"}


def doctor(
    model: Annotated[
        str,
        typer.Option(help="Estimate the K/V memory of this model.", autocompletion=known_models),
    ] = "loopus-tiny",
    as_json: JsonOption = False,
) -> None:
    """Check versions, the plugin in vLLM's processes, devices, memory and common mistakes.

    Exit code 1 if something prevents serving LoopUS models.
    """
    findings = examine(model)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(("check", "", "found"), [_row(finding) for finding in findings])
    if any(finding.status == ERROR for finding in findings):
        raise typer.Exit(PROBLEM)


def _row(finding: Finding) -> tuple[str, Text, Text]:
    from rich.markup import escape

    fix = f"\n[bold]fix:[/] {escape(finding.fix)}" if finding.fix else ""
    status = STYLES.get(finding.status, "[bold red]error[/]")
    details = escape(finding.found) + fix
    return finding.check, Text.from_markup(status), Text.from_markup(details)
