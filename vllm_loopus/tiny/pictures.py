"""Pictures of the results of `loopus-tiny`: accuracy by loops, exit depths, training curves."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes

from vllm_loopus.tiny.tasks import MAX_DIFFICULTY, TASKS
from vllm_loopus.training.metrics import read_metrics

LEVELS = range(1, MAX_DIFFICULTY + 1)
STYLES = {"base": ":", "control": "--"}


def draw_all(result: dict[str, Any], training: Path | None, folder: Path) -> None:
    """Draws `accuracy.png`, `exit-depths.png` and, if a training run is given, `training.png`."""
    _save(_accuracy(result), folder / "accuracy.png")
    _save(_exit_depths(result), folder / "exit-depths.png")
    if training is not None:
        _save(_training(training), folder / "training.png")


def _accuracy(result: dict[str, Any]) -> Any:
    figure, panels = pyplot.subplots(1, len(TASKS) + 1, figsize=(12, 4), layout="constrained")
    depths = range(1, result["looped"]["max_loops"] + 1)
    for task, axes in zip(TASKS, panels[1:], strict=True):
        for k in LEVELS:
            shares = [100 * n["by_difficulty"][task][k - 1] for n in result["looped"]["by_depth"]]
            axes.plot(depths, shares, ".-", color=_colour(k), label=f"k = {k}")
        _label(axes, task)
    panels[-1].legend(title="steps needed", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    everything = panels[0]
    by_depth = result["looped"]["by_depth"]
    everything.errorbar(
        depths,
        [100 * n["accuracy"] for n in by_depth],
        [300 * n["standard_error"] for n in by_depth],
        fmt="o-",
        capsize=3,
        label="looped",
    )
    for name, numbers in result["plain"].items():
        share, error = 100 * numbers["accuracy"], 300 * numbers["standard_error"]
        (line,) = everything.plot(
            depths, [share] * len(depths), STYLES.get(name, "-."), label=f"{name} (plain)"
        )
        everything.fill_between(
            depths, share - error, share + error, alpha=0.15, color=line.get_color()
        )
    _label(everything, f"all {result['items']:,} items, ± 3 standard errors")
    everything.legend(fontsize=8)
    return figure


def _label(axes: Axes, title: str) -> None:
    axes.set(xlabel="loops", ylabel="right answers, %", title=title, ylim=(0, 103))
    axes.grid(alpha=0.3)


def _exit_depths(result: dict[str, Any]) -> Any:
    looped = result["looped"]
    exits = looped["early_exit"][str(looped["default_threshold"])]["exit_depths"]
    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(10, 4), layout="constrained")
    for task, axes in zip(TASKS, panels, strict=True):
        counts = np.array(exits[task], dtype=float)  # difficulty, depth
        shares = 100 * counts / counts.sum(1, keepdims=True)
        bottom = np.zeros(len(shares))
        depths = range(1, shares.shape[1] + 1)
        for depth in depths:
            colour = pyplot.get_cmap("viridis")((depth - 1) / max(len(depths) - 1, 1))
            axes.bar(LEVELS, shares[:, depth - 1], bottom=bottom, color=colour, label=depth)
            bottom += shares[:, depth - 1]
        means = (counts * np.array(depths)).sum(1) / counts.sum(1)
        for k, mean in zip(LEVELS, means, strict=True):
            axes.annotate(f"{mean:.1f}", (k, 101), ha="center", fontsize=8)
        axes.set(xlabel="steps needed (k)", ylabel="answers, %", ylim=(0, 108))
        axes.set_title(f"{task} (mean exit depth on top)")
    panels[-1].legend(title="exit depth", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"Exit depths of answers, exit threshold {looped['default_threshold']}")
    return figure


def _training(run: Path) -> Any:
    lines = [line for line in read_metrics(run) if "eval_loss_depth_1" in line]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    tokens = [line.get("tokens", 0) / 1e6 for line in lines]
    depths = range(1, sum(name.startswith("eval_loss_depth_") for name in lines[0]) + 1)
    for depth in depths:
        colour = pyplot.get_cmap("viridis")((depth - 1) / max(len(depths) - 1, 1))
        for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
            values = [line[f"eval_{name}_depth_{depth}"] for line in lines]
            axes.plot(tokens, values, color=colour, label=depth)
    for axes, name in zip(panels, ("loss", "accuracy"), strict=True):
        axes.set(xlabel="tokens of data, millions", ylabel=f"held-out {name} (answer and end)")
        axes.grid(alpha=0.3)
    panels[-1].legend(title="depth", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("Post-training: held-out items at every depth")
    return figure


def _colour(k: int) -> Any:
    return pyplot.get_cmap("plasma")(0.9 * (k - 1) / (MAX_DIFFICULTY - 1))


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
