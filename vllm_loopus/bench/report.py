"""A run's results on disk: report.json, report.html (one file, nothing fetched) and report.png."""

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_loopus.bench.figures import HEADS, STATES, figures, headline
from vllm_loopus.bench.pictures import draw
from vllm_loopus.bench.run import FORMAT
from vllm_loopus.files import complete_file, write_text

JSON, PAGE, PICTURE = "report.json", "report.html", "report.png"


def keep(report: Mapping[str, Any], folder: Path) -> None:
    """What there is of a report, as JSON. Raises `OSError` naming the file."""
    write_text(folder / JSON, json.dumps(report, indent=1))


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Each file complete or not at all. Raises `OSError` naming it."""
    keep(report, folder)
    picture = io.BytesIO()
    draw(report).savefig(picture, format="png", dpi=110)
    with complete_file(folder / PICTURE) as unfinished:
        unfinished.write_bytes(picture.getvalue())
    write_text(folder / PAGE, page(report, picture.getvalue()))


def read(folder: Path) -> dict[str, Any]:
    """A report of an earlier run, by its folder or its JSON file. Raises `ValueError`."""
    file = folder / JSON if folder.is_dir() else folder
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a vllm-loopus bench report: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{file} is not a vllm-loopus bench report (unknown format)")
    return report


def page(report: Mapping[str, Any], picture: bytes) -> str:
    """The summary. Whatever a run says of itself is escaped."""
    environment = Environment(
        loader=PackageLoader("vllm_loopus.bench"), undefined=StrictUndefined, autoescape=True
    )
    environment.filters["milli"] = lambda seconds: f"{1e3 * seconds:.1f}"
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=headline(report),
        heads=HEADS,
        rows=[(figure.cells(), figure.note) for figure in figures(report)],
        states=STATES,
        picture=base64.b64encode(picture).decode(),
        raw=json.dumps(
            {k: report[k] for k in ("plan", "model", "engines") if k in report}, indent=1
        ),
    )
