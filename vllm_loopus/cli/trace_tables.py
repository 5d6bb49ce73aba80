"""Prints a trace in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_loopus.trace.tokens import visible

SHORT = {"confidence": "q", "gate_mean": "gate", "step_length": "step"}
FORMS = {"confidence": ".3f", "gate_mean": ".3f"}


def print_tables(document: Mapping[str, Any]) -> None:
    """Prints values by depth over all prompts; for a single prompt, also every token."""
    console = Console()
    traces = document["traces"]
    if len(traces) == 1:
        _print_trace(console, traces[0], document["values"])
    _print_convergence(console, document["convergence"], document["values"])
    depths = [depth for trace in traces for depth in trace["exit_depths"]]
    most = document["halting"]["max_loops"]
    mean = sum(depths) / len(depths)
    console.print(f"mean exit depth {mean:.2f} of {most}, passes saved {1 - mean / most:.1%}")


def _print_trace(console: Console, trace: Mapping[str, Any], names: Sequence[str]) -> None:
    """A row for each token and depth. The exit is bold; depths deeper than it are dim."""
    table = Table("token", "depth", "predicts", "p", *map(_short, names), "exit by")
    for index, token in enumerate(trace["tokens"]):
        for depth in token["depths"]:
            here = depth["depth"] == token["exit_depth"]
            best = depth["top"][0]
            name = f"{index}: {visible(token['text'])}" if depth["depth"] == 1 else ""
            cells = [
                Text(name),  # without markup: a token may be [red]
                Text(str(depth["depth"])),
                Text(visible(best["text"])),
                _number(best["probability"], ".3f"),
                *(_number(depth[name], FORMS.get(name, ".3g")) for name in names),
                Text(token["left_by"] if here else ""),
            ]
            if here:
                style = "bold reverse"
            else:
                style = "dim" if depth["depth"] > token["exit_depth"] else ""
            for cell in cells[1:]:
                cell.stylize(style)
            table.add_row(*cells)
        table.add_section()
    console.print(table)


def _print_convergence(console: Console, found: Mapping[str, Any], names: Sequence[str]) -> None:
    table = Table(
        "depth", "KL to last", "agrees", *map(_short, names),
        title=f"means over {found['num_tokens']} tokens (quantiles 0.1, 0.5, 0.9)",
    )  # fmt: skip
    for row in found["depths"]:
        table.add_row(
            str(row["depth"]),
            _with_quantiles(row["kl_to_last"]),
            f"{row['agreement']:.1%}",
            *(_with_quantiles(row[name], FORMS.get(name, ".3g")) for name in names),
        )
    console.print(table)


def _with_quantiles(value: Mapping[str, Any], form: str = ".3g") -> Text:
    quantiles = " ".join(_number(v, ".2g").plain for v in value["quantiles"].values())
    return Text.assemble(_number(value["mean"], form), (f" ({quantiles})", "dim"))


def _short(name: str) -> str:
    """The heading of a column of values."""
    return SHORT.get(name, name.replace("_", " "))


def _number(value: float | None, form: str) -> Text:
    return Text("not finite" if value is None else format(value, form))
