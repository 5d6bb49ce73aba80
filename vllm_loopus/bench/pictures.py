"""The summary as one picture."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
PART_COLOURS = colormaps["tab20"].colors  # type: ignore[attr-defined]
SIDES = {
    "uncached": "transformers, no cache",
    "cached": "transformers, cached loop",
    "ours": "ours",
    "base": "base, transformers",
}


def draw(report: Mapping[str, Any]) -> Figure:
    """Throughput, seconds for each token, latency, quality, and where the time goes."""
    drawn: dict[str, Callable[[Axes, Any], None]] = {
        "sweep": _throughput,
        "cache": _cache,
        "served": _latency,
        "quality": _quality,
        "decode": _profile,
    }
    names = [name for name in drawn if report.get(name)]
    columns = min(3, max(1, len(names)))
    rows = -(-max(1, len(names)) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    title = f"{report['date'][:10]}, {report['machine']}, {report['dtype']}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for name, axes in zip(names, panels, strict=False):
        drawn[name](axes, report[name])
        axes.grid(alpha=0.25)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def _throughput(axes: Axes, found: Mapping[str, Any]) -> None:
    lines: dict[tuple[str, float], list[tuple[int, float]]] = {}
    for row in found["throughput"]:
        line = lines.setdefault((row["policy"], row["law_mean"]), [])
        line.append((row["batch"], median(row["rates"])))
    means = sorted({mean for _, mean in lines})
    for (policy, mean), points in lines.items():
        style, colour = "-" if policy == "exact" else "--", COLOURS[means.index(mean)]
        label = f"{policy}, mean depth {mean:g}"
        batches, rates = zip(*points, strict=True)
        axes.plot(batches, rates, style, marker=".", color=colour, label=label)
    axes.set(xlabel="sequences", ylabel="tokens/s", title="throughput by batch and mean depth")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)


def _cache(axes: Axes, found: Mapping[str, Any]) -> None:
    lengths = [row["length"] for row in found["lengths"]]
    for name, label in SIDES.items():
        axes.plot(lengths, [row[name] for row in found["lengths"]], ".-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tokens of the answer", ylabel="s/token", title="full depth, one sequence")
    axes.legend(fontsize=7)


def _latency(axes: Axes, found: Mapping[str, Any]) -> None:
    names = [(metric, p) for metric in ("ttft", "tpot", "e2el") for p in found["on"]["ms"][metric]]
    for shift, state in enumerate(("off", "on")):
        values = [found[state]["ms"][metric][p] for metric, p in names]
        axes.bar(
            [place + 0.4 * shift for place in range(len(names))],
            values,
            width=0.4,
            label=f"early exit {state}",
        )
    axes.set_xticks(
        [p + 0.2 for p in range(len(names))], [f"{m}\n{p}" for m, p in names], fontsize=7
    )
    axes.set_yscale("log")
    axes.set(ylabel="ms", title=f"latency at {found['request_rate']:.2g} requests/s")
    axes.legend(fontsize=7)


def _quality(axes: Axes, found: Mapping[str, Any]) -> None:
    for name, row in found["settings"].items():
        x, y = row["answers_a_second"], 100 * row["accuracy"]
        axes.errorbar(x, y, yerr=100 * row["standard_error"], fmt=".", color=COLOURS[0])
        axes.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="answers/s", ylabel="right, %", title="loopus-tiny by exit threshold")


def _profile(axes: Axes, found: list[Mapping[str, Any]]) -> None:
    bars = {
        f"{policy['policy']}, {row['seqs']}": policy["profile"]["parts"]
        for row in found
        for policy in row["policies"]
    }
    ends = dict.fromkeys(bars, 0.0)
    for place, part in enumerate(sorted({part for parts in bars.values() for part in parts})):
        shares = [parts.get(part, 0.0) for parts in bars.values()]
        colour = PART_COLOURS[place % len(PART_COLOURS)]
        axes.barh(list(bars), shares, left=list(ends.values()), color=colour, label=part)
        ends = {bar: end + share for (bar, end), share in zip(ends.items(), shares, strict=True)}
    axes.set(xlabel="share of the time", title="where the time goes, early exit on")
    axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
