"""The `vllm-loopus` command with all its subcommands."""

from importlib import import_module

import typer

from vllm_loopus.cli.alias import alias_app
from vllm_loopus.cli.output import report_errors
from vllm_loopus.extras import MissingExtraError

app = typer.Typer(
    name="vllm-loopus",
    help="Tools for looped language models on vLLM.",
    epilog="Exit codes: 0 done, 1 a problem was found, 2 the input is wrong.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# Command -> module of this package, and function.
COMMANDS = {
    "doctor": ("doctor", "doctor"),
    "info": ("info", "info"),
    "recast": ("recast", "recast"),
    "analyze": ("recast", "analyze"),
    "convert": ("recast", "convert"),
    "train": ("train", "train"),
    "trace": ("trace", "trace"),
    "depths": ("depths", "depths"),
    "bench": ("bench", "bench"),
    "batch": ("batch", "batch"),
    "deploy": ("deploy", "deploy"),
    "eval": ("eval", "evaluate"),
}


def _add_missing(name: str, error: MissingExtraError) -> None:
    """Adds a command that only reports which libraries are missing."""

    def missing(_arguments: typer.Context) -> None:
        with report_errors():
            raise error

    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, help=f"Not installed: {error}", context_settings=anything)(missing)


app.add_typer(alias_app)
for name, (module, function) in COMMANDS.items():
    try:
        app.command(name)(getattr(import_module(f"vllm_loopus.cli.{module}"), function))
    except MissingExtraError as error:
        _add_missing(name, error)


@app.callback()
def main() -> None:
    """Tools for looped language models on vLLM."""
