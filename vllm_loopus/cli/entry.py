"""The entry point of `vllm-loopus`, which reports missing libraries in one line."""

import sys

from vllm_loopus.extras import MissingExtraError, need


def main() -> None:
    """Runs the command line. If a library is missing, prints its install command, exit code 2."""
    try:
        need("vllm-loopus", "tools", "typer", "rich")
        from vllm_loopus.cli.main import app

        app()
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
