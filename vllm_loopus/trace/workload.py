"""Statistics of the exit depths of a workload: overall, by position, token class and label."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from vllm_loopus.trace.runs import Answered
from vllm_loopus.trace.tokens import CLASSES

QUANTILES = (0.1, 0.5, 0.9)
EXACT_POSITIONS = 8  # later positions of an answer are grouped: 9-16, 17-32, ...


def statistics(answers: Sequence[Answered]) -> dict[str, Any]:
    """Statistics as JSON: `overall`, and `groups` by `position`, `token class` and `label`.

    Each has the number of tokens, the mean, its standard error, quantiles, and the number of tokens
    by exit depth. Position 1 is the first token of an answer. Answers without a label are not in
    the groups by label.
    """
    deepest = max((max(a.exit_depths) for a in answers if a.exit_depths), default=1)
    rows = [
        (bucket(place), token_class, answer.label, depth)
        for answer in answers
        for place, (token_class, depth) in enumerate(
            zip(answer.classes, answer.exit_depths, strict=True), 1
        )
    ]
    return {
        "answers": len(answers),
        "overall": _summary("all", [row[3] for row in rows], deepest),
        "groups": {
            "position": _grouped(rows, 0, _position_order, deepest),
            "token class": _grouped(rows, 1, CLASSES.index, deepest),
            "label": _grouped(rows, 2, _label_order, deepest),
        },
    }


def bucket(position: int) -> str:
    """The group of a 1-based position in an answer."""
    if position <= EXACT_POSITIONS:
        return str(position)
    high = EXACT_POSITIONS
    while high < position:
        high *= 2
    return f"{high // 2 + 1}-{high}"


def _grouped(
    rows: Iterable[Sequence[Any]], column: int, order: Callable[[Any], Any], deepest: int
) -> list[dict[str, Any]]:
    depths: dict[str, list[int]] = {}
    for row in rows:
        if row[column] is not None:
            depths.setdefault(row[column], []).append(row[3])
    return [_summary(group, depths[group], deepest) for group in sorted(depths, key=order)]


def _summary(group: str, depths: Sequence[int], deepest: int) -> dict[str, Any]:
    if not depths:
        raise ValueError("the run has no tokens")
    values = np.array(depths)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    levels = np.quantile(values, QUANTILES)
    return {
        "group": group,
        "tokens": len(values),
        "mean": round(float(values.mean()), 4),
        "standard_error": None if error is None else round(float(error), 4),
        "quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, levels, strict=True)},
        "by_depth": {str(d): int((values == d).sum()) for d in range(1, deepest + 1)},
    }


def _position_order(group: str) -> int:
    return int(group.partition("-")[0])


def _label_order(group: str) -> tuple[bool, float, str]:
    """Sorts numbers by size, then other labels."""
    try:
        return False, float(group), group
    except ValueError:
        return True, 0.0, group
