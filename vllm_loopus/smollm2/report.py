"""The report: losses while training, the quality table, where tokens exit, and what made them."""

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from vllm_loopus.recast.output import complete_folder
from vllm_loopus.recast.provenance import versions
from vllm_loopus.smollm2.sizes import Size
from vllm_loopus.smollm2.tool import tool
from vllm_loopus.training.metrics import read_metrics
from vllm_loopus.training.thresholds import suggestion

PROMPT = "What is the capital of France?"


def write(out: Path, size: Size) -> None:
    """Evaluates the models of a run in `out` and writes its folder `report`, atomically.

    Raises `ToolError` if a command fails.
    """
    losses = {name: read_metrics(out / name) for name in ("looped", "control")}
    # The same results folder: an interrupted evaluation continues.
    exact = quality(out, size, "--by-depth", "--base", str(out / "base"), "--base", control(out))
    approximate = quality(out, size, "--early-exit", "--kv-policy", "last_exited", "--base", "none")
    table = {**exact, "rows": [*exact["rows"], *approximate["rows"]]}
    with complete_folder(out / "report") as folder:
        trace(out, folder / "trace.html")
        picture = BytesIO()
        draw(losses).savefig(picture, format="png", dpi=110)
        (folder / "training.png").write_bytes(picture.getvalue())
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "tokens": {name: lines[-1]["tokens"] for name, lines in losses.items()},
            "seconds": {name: lines[-1]["seconds"] for name, lines in losses.items()},
            "last": {name: evaluations(lines)[-1] for name, lines in losses.items()},
            "first": {name: evaluations(lines)[0] for name, lines in losses.items()},
            "table": table,
            "sources": json.loads((out / "data" / "sources.json").read_text()),
            "versions": versions(),
        }
        (folder / "report.json").write_text(json.dumps(found, indent=1))
        depths = by_depth(found["last"]["looped"], "eval_loss")
        environment = Environment(
            loader=PackageLoader("vllm_loopus.smollm2"), undefined=StrictUndefined, autoescape=True
        )
        page = environment.get_template("report.html.j2").render(
            **found,
            picture=base64.b64encode(picture.getvalue()).decode(),
            depths=depths,
            suggestion=suggestion(found["last"]["looped"], len(depths)),
            untrained=by_depth(found["first"]["looped"], "eval_loss"),
            columns=[column["title"] for column in table["columns"]],
            perplexities=[c["title"] for c in table["columns"] if "perplexity" in c["metric"]],
        )
        (folder / "report.html").write_text(page)


def control(out: Path) -> str:
    """The folder of the control."""
    return str(out / "control" / "model")


def quality(out: Path, size: Size, *options: str) -> dict[str, Any]:
    """The quality table of `vllm-loopus eval` as JSON."""
    found: dict[str, Any] = json.loads(
        tool(
            *("eval", str(out / "looped" / "model"), "--tasks", "held-out"),
            *("--held-out", str(out / "data" / "held-out.jsonl"), "--limit", str(size.documents)),
            *("--out", str(out / "eval-results"), "--json", *options),
            captured=True,
        )
    )
    return found


def trace(out: Path, page: Path) -> None:
    """The trace page of a chat answer."""
    tool(
        *("trace", str(out / "looped" / "model"), "--chat", "--prompt", PROMPT),
        *("--max-tokens", "16", "--html", str(page)),
        captured=True,
    )


def evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are evaluations."""
    return [line for line in lines if any(name.startswith("eval_loss") for name in line)]


def by_depth(line: Mapping[str, Any], name: str) -> list[float]:
    """The values of a metric at depths 1, 2, ..."""
    found: list[float] = []
    while (value := line.get(f"{name}_depth_{len(found) + 1}")) is not None:
        found.append(value)
    return found


def draw(losses: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """Held-out losses by tokens: looped at each depth, and the control."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, style in (("looped", "o-"), ("control", "s--")):
        lines = evaluations(losses[name])
        tokens = [line["tokens"] for line in lines]
        if name == "control":
            axes.plot(tokens, [line["eval_loss"] for line in lines], style, label="control")
            continue
        for depth in range(len(by_depth(lines[0], "eval_loss"))):
            values = [by_depth(line, "eval_loss")[depth] for line in lines]
            axes.plot(tokens, values, style, label=f"looped, depth {depth + 1}")
    axes.set_xlabel("tokens of training")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(fontsize=8)
    return figure
