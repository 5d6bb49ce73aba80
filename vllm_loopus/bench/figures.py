"""The figures of a run, each beside what is wanted of it: the table, as text and Markdown."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_loopus.bench.ratios import Ratio
from vllm_loopus.files import write_text

MARKERS = ("<!-- bench:start -->", "<!-- bench:end -->")
# Of the published size on two cores, by policy and sequences.
WANTED_ON_OVER_OFF = {("exact", 4): 1.35, ("exact", 16): 1.15, ("last_exited", 16): 2.0,
                      ("last_exited", 64): 2.1}  # fmt: skip
WANTED_OF_IDEAL = {16: 0.83, 64: 0.9}
OF_SIMULATED, OFF_OVER_PLAIN, OFF_OVER_BASE = 0.95, 0.98, 0.97
MIXED, UNEVEN, OVERHEAD = 1.6, 4.0, 0.08
STATES = {True: "reached", False: "missed", None: ""}


@dataclass(frozen=True)
class Figure:
    """A ratio and its target. `wanted`: at least this, with `at_most` at most; None without a
    target. `valid`: whether the engines compared gave the same answers."""

    name: str
    value: Ratio
    wanted: float | None = None
    at_most: bool = False
    note: str = ""
    valid: bool = True

    @property
    def reached(self) -> bool | None:
        if self.wanted is None:
            return None
        measured = self.value.median
        return self.valid and (measured <= self.wanted if self.at_most else measured >= self.wanted)

    def cells(self) -> tuple[str, str, str, str]:
        wanted = "" if self.wanted is None else f"{'≤' if self.at_most else '≥'} {self.wanted:g}"
        return self.name, str(self.value), wanted, STATES[self.reached]


HEADS = ("figure", "measured: median (95 % interval)", "wanted", "")


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """Of a report. What is wanted is so of the published size alone."""
    found = [*_decode(report), *_prefill(report), *_uneven(report), *_others(report)]
    if report["plan"]["size"] != "published":
        return [Figure(f.name, f.value, note=f.note) for f in found]
    return found


def _decode(report: Mapping[str, Any]) -> Iterator[Figure]:
    for part in report.get("decode", ()):
        seqs = part["seqs"]
        for row in part["policies"]:
            policy = row["policy"]
            where = f"`{policy}`, {seqs} sequences"
            taken, model = row["counts"], row["simulated"]
            note = (
                f"{taken['passes']:.3f} passes per token of {taken['rows']:.1f} rows (simulated "
                f"{model['passes']:.3f} of {model['rows']:.1f})"
            )
            if row["explained"]:
                note += f"; {row['explained']}"
            wanted = WANTED_ON_OVER_OFF.get((policy, seqs))
            yield Figure(
                f"early exit on over off, {where}", _r(row["on_over_off"]), wanted, note=note
            )
            simulated = _r(row["of_simulated"])
            yield Figure(f"of the simulated policy, {where}", simulated, OF_SIMULATED)
            wanted = WANTED_OF_IDEAL.get(seqs) if policy == "last_exited" else None
            note = f"{row['of_ideal_full_batch']:.2f} while all slots are in use"
            yield Figure(f"of ideal, {where}", _r(row["of_ideal"]), wanted, note=note)
            plain = _r(row["off_over_plain"])
            yield Figure(f"early exit off over a plain loop, {where}", plain, OFF_OVER_PLAIN)
            outside = Ratio.of([row["profile"]["outside_passes_and_boundaries"]])
            wanted = OVERHEAD if seqs == 16 else None
            around = row["profile"]["parts"]["passes: around the layers"]
            note = f"and {around:.3f} in passes, around their layers"
            yield Figure(
                f"engine overhead, share of time, {where}", outside, wanted, at_most=True, note=note
            )
        base = _r(part["off_over_base"]["ratio"])
        name = f"early exit off over the base by its work, {seqs} sequences"
        note = f"a token meets {part['off_over_base']['work']:.2f} times the base's weights"
        yield Figure(name, base, OFF_OVER_BASE, note=note)


def _prefill(report: Mapping[str, Any]) -> Iterator[Figure]:
    for name in ("mixed", "long"):
        for row in report.get(name, {}).get("policies", ()):
            wanted = MIXED if row["policy"] == "last_exited" and name == "mixed" else None
            title = f"{name}, prefill included: on over off, `{row['policy']}`"
            yield Figure(title, _r(row["on_over_off"]), wanted)


def _uneven(report: Mapping[str, Any]) -> Iterator[Figure]:
    if "uneven" not in report:
        return
    part = report["uneven"]
    is_original = part["against"] == "original"
    other = "the original's cached generation" if is_original else "a cached loop (stand-in)"
    answers = part["answers"]
    note = (
        f"{answers['same_as_uncached']} of {answers['tokens']} tokens as the uncached model says"
        f", {answers['different_and_sure']} others beyond a margin of 1e-4; exit depths "
        f"{'equal' if answers['same_depths'] else 'differ'}"
    )
    if (by_original := answers["same_as_originals_uncached"]) is not None:
        note += (
            f"; {by_original['same']} of {by_original['tokens']} as the original's uncached forward"
        )
    layers, hidden = part["model"]["layers"], part["model"]["hidden"]
    yield Figure(
        f"`exact` over {other}, {part['requests']} uneven requests, {layers} layers of {hidden}",
        _r(part["ours_over_theirs"]),
        UNEVEN if is_original else None,
        note=note,
        valid=not answers["different_and_sure"],
    )


def _others(report: Mapping[str, Any]) -> Iterator[Figure]:
    if "cache" in report:
        row = report["cache"]["lengths"][-1]
        where = f"the tokens up to the {row['length']}th, full depth, one sequence"
        name = f"without a K/V cache over with one (transformers), {where}"
        yield Figure(name, Ratio.of([row["uncached"] / row["cached"]]))
        yield Figure(f"cached loop over ours, {where}", Ratio.of([row["cached"] / row["ours"]]))
    if "served" in report:
        part = report["served"]
        for metric, name in (("ttft", "to the first token"), ("e2el", "of a request")):
            off, on = (part[state]["ms"][metric]["p90"] for state in ("off", "on"))
            yield Figure(
                f"served: p90 of the time {name}, early exit off over on",
                Ratio.of([off / on]),
                note=f"{off:.0f} and {on:.0f} ms at {part['request_rate']:.2f} requests/s",
            )


def _r(values: Mapping[str, Any]) -> Ratio:
    return Ratio(**values)


def markdown(report: Mapping[str, Any]) -> str:
    """The table with date, machine and command."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    lines += [f"| {' | '.join(figure.cells())} |" for figure in figures(report)]
    return "\n".join([*lines, "", headline(report)])


def headline(report: Mapping[str, Any]) -> str:
    """Date, machine, command and model of a table."""
    model, plan = report["model"], report["plan"]
    text = (
        f"{report['date'][:10]}, {report['machine']}, {report['dtype']}; `{report['command']}`; "
        f"{model['layers']} layers of {model['hidden']}, {model['max_loops']} loops, mean exit "
        f"depth {plan['mean']:g}, replayed from a geometric law where not said otherwise."
    )
    for part in report.get("decode", ()):
        reach = ", ".join(
            f"{r['simulated']['ratio']:.2f} in `{r['policy']}`" for r in part["policies"]
        )
        text += (
            f" {part['requests']} requests of {plan['tokens']} tokens, {part['seqs']} at a time: "
            f"best simulated on/off ratio: {reach}."
        )
    return text


def place_in(file: Path) -> tuple[str, int, int]:
    """The text of a Markdown file, and where its markers are. Raises `ValueError` where it has
    none."""
    text = file.read_text()
    start, end = (text.find(marker) for marker in MARKERS)
    if not 0 <= start < end:
        raise ValueError(
            f"into={file} has no lines {' and '.join(MARKERS)} to put the table between; add them"
        )
    return text, start, end


def write_into(file: Path, report: Mapping[str, Any]) -> None:
    """Puts the table between the markers of a Markdown file.

    Raises `ValueError` where the file has none.
    """
    text, start, end = place_in(file)
    inside = f"{MARKERS[0]}\n{markdown(report)}\n"
    write_text(file, text[:start] + inside + text[end:])


SAME = ("dtype", "device", "machine", "model")
AGREES = {True: "yes", False: "no", None: "one round"}


def raise_if_incomparable(about: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """`about` is a report, or what is known of one before it is measured.

    Raises `ValueError` naming what differs from the `other` run.
    """
    pairs = [(name, about[name], other[name]) for name in SAME]
    plan, earlier = ({**one["plan"], "sections": None} for one in (about, other))
    pairs += [(f"plan, {name}", plan[name], earlier.get(name)) for name in plan]
    for name, value, before in pairs:
        if _plain(value) != _plain(before):
            raise ValueError(
                f"compare: {name} is {value!r} here and {before!r} in the earlier run; "
                "measure again with the same options on the same machine"
            )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def agreement(report: Mapping[str, Any], other: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Figures of two runs beside each other, and whether their spreads overlap.

    Raises `ValueError` where they have no figure in common.
    """
    earlier = {figure.name: figure.value for figure in figures(other)}
    both = [figure for figure in figures(report) if figure.name in earlier]
    if not both:
        raise ValueError(
            "compare: the two runs have no figure in common; measure the same sections"
        )
    return [
        (f.name, str(f.value), str(earlier[f.name]), AGREES[f.value.agrees(earlier[f.name])])
        for f in both
    ]
