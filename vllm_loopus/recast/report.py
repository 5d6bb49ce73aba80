"""The report of an analysis: JSON, a PNG with all curves and the cut, and an HTML page."""

import base64
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_loopus.files import complete_file, write_text
from vllm_loopus.recast.cut import Cut, range_text

PICTURE, PAGE, NUMBERS = "representation.png", "report.html", "analysis.json"
COLOURS = {"encoder": "#4c78a8", "reasoning": "#54a24b", "decoder": "#e45756"}
RUNNERS_UP = 8


def write_report(folder: Path, numbers: Mapping[str, Any], cut: Cut, chosen_by: str) -> None:
    """Writes `analysis.json`, `representation.png` and `report.html` to `folder`, atomically.

    `numbers`: from `Analysis.to_dict`. `chosen_by`: a sentence on how `cut` was chosen.
    """
    numbers = {"cut": cut.runs, **numbers}
    write_text(folder / NUMBERS, json.dumps(numbers, indent=1))
    picture = BytesIO()
    draw(numbers, cut).savefig(picture, format="png", dpi=110)
    with complete_file(folder / PICTURE) as unfinished:
        unfinished.write_bytes(picture.getvalue())
    environment = Environment(
        loader=PackageLoader("vllm_loopus.recast"), undefined=StrictUndefined, autoescape=True
    )
    ranking = [
        {
            "parts": {part: range_text(run) for part, run in ranked["cut"].items()},
            "score": ranked["score"],
            "losses": ranked["losses"],
            "chosen": ranked["cut"] == cut.runs,
        }
        for place, ranked in enumerate(numbers["ranking"])
        if place < RUNNERS_UP or ranked["cut"] == cut.runs
    ]
    page = environment.get_template("report.html.j2").render(
        numbers=numbers,
        cut=cut,
        chosen_by=chosen_by,
        picture=base64.b64encode(picture.getvalue()).decode(),
        parts=[part for part, run in cut.runs.items() for _ in run],
        colours=COLOURS,
        ranking=ranking,
        data=json.dumps(numbers, indent=1),
    )
    write_text(folder / PAGE, page)


def draw(numbers: Mapping[str, Any], cut: Cut) -> Figure:
    """Draws all curves of an analysis, with the parts of `cut` shaded."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    figure.suptitle(f"{numbers['base']}: {cut}", parse_math=False)
    axes = figure.subplots(2, 3).flatten()
    _heat_map(axes[0], numbers["cosine"], cut)
    layers, states = range(cut.num_layers), range(cut.num_layers + 1)
    _curve(axes[1], "cosine of a layer's input and output", layers, numbers["similarity"], cut)
    _curve(axes[2], "length of a layer's update / norm of its input", layers, numbers["step"], cut)
    axes[2].set_yscale("log")
    _curve(axes[3], "norm of the state", states, numbers["norm"], cut)
    axes[3].set_yscale("log")
    _curve(axes[4], "angle to the last state (degrees)", states, numbers["angle_to_final"], cut)
    _curve(axes[5], "logit lens (nats)", states, numbers["lens_entropy"], cut, "entropy")
    axes[5].plot(states, numbers["lens_kl"], marker=".", color="#b279a2", label="KL from the end")
    axes[5].legend()
    return figure


def _curve(
    axes: Axes, title: str, x: range, values: list[float], cut: Cut, label: str | None = None
) -> None:
    """Draws a curve over layers (x from 0 to L-1) or over states (x from 0 to L)."""
    over_layers = len(x) == cut.num_layers
    first = -0.5 if over_layers else 0.0  # layer l takes state l to state l + 1
    for part, run in cut.runs.items():
        if run:
            ends = run[0] + first, run[-1] + 1 + first
            axes.axvspan(*ends, alpha=0.12, color=COLOURS[part], linewidth=0)
    axes.plot(x, values, marker=".", color="#333333", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("layer" if over_layers else "state")


def _heat_map(axes: Axes, cosine: list[list[float]], cut: Cut) -> None:
    image = axes.imshow(cosine, vmin=min(0.0, *map(min, cosine)), vmax=1, cmap="viridis")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    for boundary in (cut.encoder, cut.num_layers - cut.decoder):
        axes.axhline(boundary, color="white", linestyle="--", linewidth=0.8)
        axes.axvline(boundary, color="white", linestyle="--", linewidth=0.8)
    axes.set_title("cosine of every two states", fontsize=10)
    axes.set_xlabel("state")
    axes.set_ylabel("state")
