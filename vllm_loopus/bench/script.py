"""What the scripts of `benchmarks/` do alike: options, the head of the output, JSON."""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_loopus.bench.host import about_run
from vllm_loopus.files import write_text


def script_parser(text: str | None) -> ArgumentParser:
    """A parser with `--write FILE`, whose `--help` shows `text`, the script's docstring."""
    parser = ArgumentParser(description=text, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=_output, metavar="FILE", help="write the results as JSON")
    return parser


def _output(text: str) -> Path:
    """Refused before hours of measuring, not after."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise ArgumentTypeError(f"{text} is not a file in an existing folder")
    return file


def begin() -> dict[str, Any]:
    """Prints date, machine and command. Returns them as the beginning of the report."""
    report = about_run(["python", *sys.argv])
    print(f"{report['date']}  {report['machine']}\n{report['command']}\n", flush=True)
    return report


def finish(report: Mapping[str, Any], file: Path | None) -> None:
    """Writes the report as JSON where a file is given, complete or not at all.

    Raises `OSError` naming the file.
    """
    if file is not None:
        write_text(file, json.dumps(report, indent=1))
