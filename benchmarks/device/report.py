"""What was measured? Tables for docs/gpu.md: ratios, with floors and predictions beside them.

    python benchmarks/device/report.py results.jsonl [--predict]

`--predict` runs `benchmarks/host.py` here, with the costs that were measured: the share of the
device's time that an emulated device of these costs would be used.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from results import Line, endings, read

HOST = Path(__file__).resolve().parents[1] / "host.py"
AIMS = (
    "Wanted: `last_exited` at 64 at least 0.9 of ideal, `exact` at 16 at least 1.6 times off, a "
    "replayed pass of 16 rows within 1.25 of its floor, all golden answers equal."
)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Markdown; nothing where there are no rows."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    if lines:
        yield "| " + " | ".join(head) + " |"
        yield "|" + "---|" * len(head)
        yield from lines
        yield ""


def text_of(lines: Sequence[Line], predict: bool) -> Iterator[str]:
    calls = [line for line in lines if "call" in line]
    if calls:
        machine = calls[-1]["machine"]
        cards = ", ".join(str(gpu.get("name", gpu)) for gpu in machine["gpus"]) or machine["cpu"]
        tiny = "; a dry run: the numbers mean nothing" if calls[-1]["tiny"] else ""
        yield f"{cards}, {calls[-1]['at'][:10]}{tiny}"
        yield ""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if "values" in line:
            found.setdefault(line["measure"], []).append(line["values"])
    everything = [(name, one) for name, ones in found.items() for one in ones]
    yield from table(
        ("golden", "tokens", "depths", "attention", "runner"),
        [
            (name, *(f"{one[of]} of {one['cases']}" for of in ("equal_tokens", "equal_depths")),
             one["attention"], one["runner"])
            for name, one in everything if "equal_tokens" in one
        ],
    )  # fmt: skip
    yield from table(
        ("pass", "rows", "eager, ms", "of floor", "graph, ms", "of floor"),
        [
            (name, one["rows"], *(
                f"{one[key]:.2f}" if key in one else ""
                for key in ("eager_ms", "eager_over_floor", "graph_ms", "graph_over_floor")
            ))
            for name, one in everything if "eager_ms" in one
        ],
    )  # fmt: skip
    yield from table(
        ("tokens/s", "sequences", "off", "on", "on/off", "ideal", "of ideal"),
        [
            (name, one["sequences"], f"{one['off_tokens_s']:.0f}", f"{one['on_tokens_s']:.0f}",
             *(f"{one[key]:.2f}" for key in ("ratio", "ideal", "of_ideal")))
            for name, one in everything if "off_tokens_s" in one
        ],
    )  # fmt: skip
    yield from table(
        ("host", "sequences", "of device", "predicted", "gap, ms", "pass, ms", "boundary, ms"),
        [
            (name, one["sequences"], f"{one['of_device']:.2f}",
             f"{predicted(one):.2f}" if predict else "",
             *(f"{one[key]:.2f}" for key in ("gap_ms", "pass_ms", "boundary_ms")))
            for name, one in everything if "gap_ms" in one
        ],
    )  # fmt: skip
    yield from table(
        ("compiled", "rows", "ms", "compiled, ms", "gain"),
        [
            (name, one["rows"], f"{one['ms']:.2f}", f"{one['compiled_ms']:.2f}",
             f"{100 * one['gain']:.1f} %")
            for name, one in everything if "compiled_ms" in one
        ],
    )  # fmt: skip
    trained = [one for _, one in everything if "trained" in one]
    names = sorted({key for one in trained for key in one["metrics"] if "loss" in key})
    yield from table(
        ("trained", "tokens", *(name.removeprefix("eval_") for name in names)),
        [
            (one["trained"], one["tokens"], *(
                f"{one['before'][name]:.3f} to {one['metrics'][name]:.3f}"
                if name in one["metrics"] else "" for name in names
            ))
            for one in trained
        ],
    )  # fmt: skip
    yield from table(("measure", "ended"), endings(lines).items())
    yield AIMS


def predicted(measured: Line) -> float:
    """The share of the device's time that the emulated device of these costs is used."""
    options = {
        "seqs": measured["sequences"],
        "policy": measured["policy"],
        "pass-ms": measured["pass_ms"],
        "row-us": measured["row_us"],
        "boundary-ms": measured["boundary_ms"],
        "tokens": 32,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(HOST), *given, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["of_device"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--predict", action="store_true", help="runs benchmarks/host.py")
    given = parser.parse_args()
    try:
        lines = read(given.results)
    except ValueError as error:
        parser.error(str(error))
    if not lines:
        parser.error(f"{given.results} has no results")
    print("\n".join(text_of(lines, given.predict)))


if __name__ == "__main__":
    main()
