"""The script `vllm-loopus`: tells in one line what has to be installed for a subcommand."""

import sys

from vllm_loopus.extras import MissingExtraError, need


def main() -> None:
    """Runs the command line. Exit code 2 if a library is missing, with the command that installs
    it."""
    try:
        need("vllm-loopus", "tools", "typer", "rich")
        from vllm_loopus.cli.main import app

        app()
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
