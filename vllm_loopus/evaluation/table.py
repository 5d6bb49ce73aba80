"""The table in the paper's layout, a row for each model and setting; as text, Markdown or JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vllm_loopus.evaluation.columns import Column, column_of
from vllm_loopus.evaluation.published import PublishedRow
from vllm_loopus.evaluation.run import Plan
from vllm_loopus.evaluation.scores import (
    Score,
    average,
    by_difficulty,
    difference,
    score,
)
from vllm_loopus.evaluation.store import Result


@dataclass(frozen=True)
class Row:
    """One row of the table.

    - `scores`: by column title. `average`: of the accuracies; `delta`: its difference from that of
      the first base model.
    - `passes`: mean passes of the reasoning block per token over all tasks; None if not counted.
    - `levels`: accuracies by column title and difficulty.
    """

    model: str
    setting: str
    scores: dict[str, Score]
    average: Score | None
    delta: Score | None = None
    passes: float | None = None
    exit_depth: float | None = None
    seconds: float | None = None
    levels: dict[str, dict[int, Score]] | None = None


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    rows: list[Row]
    difficulties: list[int]

    @classmethod
    def of(cls, plan: Plan, results: Sequence[Result], published: PublishedRow | None) -> "Table":
        """Builds the table. Raises `ValueError` if a task has no metric that a column can show."""
        columns = columns_of(plan, published)
        grouped: dict[tuple[str, str], list[Result]] = {}
        for result in results:
            grouped.setdefault((result.model, result.setting), []).append(result)
        first = next(iter(grouped.values()))
        base = first if plan.cells[0].setting.max_loops is None else None
        rows = [_row(columns, found, base) for found in grouped.values()]
        if published is not None:
            rows += _published(columns, published)
        levels = {k for row in rows for scores in (row.levels or {}).values() for k in scores}
        return cls(columns, rows, sorted(levels))

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON; accuracies are from 0 to 1."""
        return {
            "columns": [vars(c) for c in self.columns],
            "rows": [_as_dict(r) for r in self.rows],
        }

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The column heads and the rows, as text."""
        titles = [f"{c.title} {'↓' if c.is_perplexity else '↑'}" for c in self.columns]
        accuracies = any(row.average for row in self.rows)
        counted = any(row.passes is not None for row in self.rows)
        heads = ["model", "depth", *titles]
        heads += ["AVG", "Δ"] if accuracies else []
        heads += ["passes/token"] if counted else []
        heads += ["time"]
        rows = []
        for row in self.rows:
            cells = [row.model, row.setting]
            cells += [_shown(row.scores.get(c.title), c.is_perplexity) for c in self.columns]
            if accuracies:
                cells += [_shown(row.average), _shown(row.delta, sign="+")]
            if counted:
                cells += ["" if row.passes is None else f"{row.passes:.2f}"]
            cells += ["" if row.seconds is None else _time(row.seconds)]
            rows.append(cells)
        return heads, rows

    def cells_by_difficulty(self) -> tuple[list[str], list[list[str]]]:
        """The table by difficulty, for the columns that have difficulties."""
        titles = [c for c in self.columns if any(c.title in (r.levels or {}) for r in self.rows)]
        heads = ["model", "depth", "task", *(f"k={k}" for k in self.difficulties)]
        rows = [
            [
                row.model,
                row.setting,
                column.title,
                *(_shown((row.levels or {})[column.title].get(k)) for k in self.difficulties),
            ]
            for column in titles
            for row in self.rows
            if column.title in (row.levels or {})
        ]
        return heads, rows


def columns_of(plan: Plan, published: PublishedRow | None = None) -> list[Column]:
    """The column of each task. Raises `ValueError` if none of a task's metrics can be shown."""
    columns = {}
    for cell in plan.cells:
        metrics = cell.task.metrics
        column = column_of(cell.task.name, metrics, bool(published and published.normalised))
        if column is None:
            raise ValueError(
                f"tasks: {cell.task.name!r} has {', '.join(metrics) or 'no metric'}, which the "
                "table cannot show; run lm-evaluation-harness directly"
            )
        columns[cell.task.name] = column
    return list(columns.values())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. HTML and cell separators in names of models are escaped."""
    rows = [[escape(cell, quote=False).replace("|", "\\|") for cell in row] for row in rows]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(columns: list[Column], results: list[Result], base: list[Result] | None) -> Row:
    pairs = list(zip(columns, results, strict=True))
    accuracies = [(c, r) for c, r in pairs if not c.is_perplexity]
    delta = None
    if base is not None and base is not results and accuracies:
        theirs = {result.task: result for result in base}
        delta = average([difference(r, theirs[r.task], c) for c, r in accuracies])
    rows, positions, depths, exits = (
        sum(getattr(r.work, name) for r in results)
        for name in ("rows", "positions", "depths", "exits")
    )
    levels = {c.title: by_difficulty(r, c) for c, r in accuracies}
    return Row(
        model=results[0].model,
        setting=results[0].setting,
        scores={c.title: score(r, c) for c, r in pairs},
        average=average([score(r, c) for c, r in accuracies]) if accuracies else None,
        delta=delta,
        passes=rows / positions if positions else None,
        exit_depth=depths / exits if exits else None,
        seconds=sum(r.seconds for r in results),
        levels={title: found for title, found in levels.items() if found},
    )


def _published(columns: list[Column], published: PublishedRow) -> list[Row]:
    """The two rows of the paper, with averages over the columns shown."""
    rows: list[Row] = []
    for setting, numbers in (("base", published.before), ("LoopUS", published.after)):
        scores = {
            c.title: Score(numbers[c.title] / (1 if c.is_perplexity else 100))
            for c in columns
            if c.title in numbers
        }
        shown = [scores[c.title] for c in columns if c.title in scores and not c.is_perplexity]
        mean = average(shown) if shown else None
        before = rows[0].average if rows else None
        delta = Score(mean.value - before.value) if mean and before else None
        rows.append(Row(f"paper, {published.base}", setting, scores, mean, delta))
    return rows


def _shown(score: Score | None, perplexity: bool = False, sign: str = "") -> str:
    if score is None:
        return ""
    scale, digits = (1, 2) if perplexity else (100, 1)
    text = f"{score.value * scale:{sign}.{digits}f}"
    return text if score.error is None else f"{text} ± {score.error * scale:.{digits}f}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _as_dict(row: Row) -> dict[str, Any]:
    found = dict(vars(row))
    for name in ("average", "delta"):
        found[name] = vars(found[name]) if found[name] else None
    found["scores"] = {title: vars(score) for title, score in row.scores.items()}
    found["levels"] = {
        title: {k: vars(score) for k, score in scores.items()}
        for title, scores in (row.levels or {}).items()
    }
    return found
