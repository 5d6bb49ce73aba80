"""`vllm-loopus`: puts the subcommands together."""

import typer

from vllm_loopus.cli.alias import alias_app
from vllm_loopus.cli.recast import analyze, convert, recast

app = typer.Typer(
    name="vllm-loopus",
    help="Tools around LoopUS models on vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(alias_app)
for command in (recast, analyze, convert):
    app.command()(command)


@app.callback()
def main() -> None:
    """Tools around LoopUS models on vLLM."""
