"""Figures of state trajectories, convergence over a data set, and exit depths of a workload."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_loopus.files import complete_file
from vllm_loopus.trace.tokens import visible

COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
INK, SHADE = "#31407a", "#b9c3ea"
CURVES = {
    "gate_mean": "gate coefficient, mean over channels",
    "step_length": "distance to the previous depth",
    "distance_to_last": "distance to the last depth",
}


def save(figure: Figure, file: Path) -> None:
    """Saves a figure atomically, in the format given by the file's suffix.

    Raises `ValueError` for an unknown format and `OSError` if `file` cannot be written.
    """
    with complete_file(file) as unfinished:
        figure.savefig(
            unfinished, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None
        )


def draw_trajectories(trace: Mapping[str, Any], title: str) -> Figure:
    """Draws the PCA of some tokens' states, and by depth their distances, and gate coefficients if
    the model has a gate.

    `trace`: one entry of a JSON trace, with `trajectories`.
    """
    found = trace["trajectories"]
    shown = [name for name in CURVES if name in trace["tokens"][0]["depths"][0]]
    rows = 2 if len(shown) > 2 else 1
    figure = Figure(figsize=(11 if rows == 2 else 15, 4 * rows), layout="constrained")
    figure.suptitle(title, parse_math=False)
    places, *curves = figure.subplots(rows, (1 + len(shown)) // rows).flatten()
    points = dict(zip(found["tokens"], found["points"], strict=True))
    for place, index in enumerate(found["drawn"]):
        path = points[index]
        token, colour = trace["tokens"][index], COLOURS[place % len(COLOURS)]
        label = f"{index}: {visible(token['text'])}"
        x, y = zip(*path, strict=True)
        places.plot(x, y, "-", color=colour, linewidth=1.2, alpha=0.8, label=label)
        places.scatter(x[1:], y[1:], s=12, color=colour)
        places.scatter(x[:1], y[:1], s=30, facecolor="white", edgecolor=colour, zorder=3)
        exit_depth = token["exit_depth"]
        places.scatter(x[exit_depth], y[exit_depth], marker="*", s=130, color=colour, zorder=4)
        depths = [depth["depth"] for depth in token["depths"]]
        for axes, name in zip(curves, shown, strict=True):
            axes.plot(depths, [d[name] for d in token["depths"]], ".-", color=colour)
            value = token["depths"][exit_depth - 1][name]
            axes.plot([exit_depth], [value], "*", color=colour, markersize=11)
    shares = [share or 0 for share in found["explained"]]
    places.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    places.set_ylabel(f"second ({shares[1]:.0%})")
    places.set_title("states (circle: depth 0, star: exit)", fontsize=10)
    for text in places.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    for axes, name in zip(curves, shown, strict=True):
        _by_depth(axes, CURVES[name])
    return figure


def draw_convergence(found: Mapping[str, Any], title: str) -> Figure:
    """Draws the means and quantiles by depth over a data set, from `convergence`."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(f"{title}, {found['num_tokens']} tokens", parse_math=False)
    depths = [row["depth"] for row in found["depths"]]
    panels = figure.subplots(1, 3)
    for axes, (name, label) in zip(
        panels,
        (("step_length", "step length"), ("kl_to_last", "KL to the last depth (nats)")),
        strict=False,
    ):
        quantiles = [row[name]["quantiles"] for row in found["depths"]]
        low, *_, high = quantiles[0]
        axes.fill_between(
            depths,
            [q[low] for q in quantiles],
            [q[high] for q in quantiles],
            color=SHADE,
            label=f"quantiles {low} to {high}",
        )
        axes.plot(depths, [row[name]["mean"] for row in found["depths"]], ".-", color=INK)
        axes.legend(fontsize=8)
        _by_depth(axes, label)
    panels[2].plot(depths, [100 * row["agreement"] for row in found["depths"]], ".-", color=INK)
    panels[2].set_ylim(0, 105)
    _by_depth(panels[2], "same token as at the last depth, %")
    return figure


def draw_workload(statistics: Mapping[str, Any], title: str) -> Figure:
    """Draws exit depths over all tokens, by position, by token class and by label."""
    groups = {name: rows for name, rows in statistics["groups"].items() if rows}
    figure = Figure(figsize=(4.2 * (len(groups) + 1), 4.2), layout="constrained")
    figure.suptitle(
        f"{title}: exit depths; means, with lines from quantile 0.1 to 0.9", parse_math=False
    )
    panels = figure.subplots(1, len(groups) + 1, squeeze=False)[0]
    counts = statistics["overall"]["by_depth"]
    depths = [int(depth) for depth in counts]
    panels[0].bar(depths, list(counts.values()), color=INK)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set(xlabel="exit depth", title="tokens")
    for axes, (name, rows) in zip(panels[1:], groups.items(), strict=True):
        _group(axes, name, rows)
    return figure


def _group(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(rows))
    means = [row["mean"] for row in rows]
    low = [row["mean"] - row["quantiles"]["0.1"] for row in rows]
    high = [row["quantiles"]["0.9"] - row["mean"] for row in rows]
    errors = [[max(0.0, v) for v in side] for side in (low, high)]
    axes.bar(places, means, color=SHADE, yerr=errors, ecolor=INK, capsize=3)
    labels = axes.set_xticks(places, [visible(str(row["group"])) for row in rows], rotation=45)
    for tick in labels or ():
        tick.label1.set_parse_math(False)
    axes.set(title=f"exit depth by {name}")


def _by_depth(axes: Axes, title: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("depth")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.grid(alpha=0.25)
