"""What the programs do alike: their options, and saying what they found."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import append

Say = Callable[..., None]


def parser(text: str | None) -> argparse.ArgumentParser:
    """`text`: the program's docstring."""
    options = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--results", type=Path, default=Path("results.jsonl"))
    options.add_argument("--name", default=Path(sys.argv[0]).stem, help="of the measure")
    options.add_argument("--tiny", action="store_true", help="the smallest model; on any machine")
    return options


def saying(given: argparse.Namespace) -> Say:
    """`say(**values)` adds a line and prints it."""

    def say(**values: Any) -> None:
        append(given.results, {"measure": given.name, "values": values})
        print(values, flush=True)

    return say


def end(holds: bool) -> None:
    """Leaves at once: there is nothing to save, and vLLM's own end takes seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if holds else 1)
