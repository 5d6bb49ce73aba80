"""Computes the values of a table from results: scores, standard errors, averages, differences."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_loopus.evaluation.columns import Column
from vllm_loopus.evaluation.store import Result

WEIGHTED = ("word_perplexity", "byte_perplexity")  # values of items are (log-likelihood, weight)


@dataclass(frozen=True)
class Score:
    """A value and its standard error. Accuracies are from 0 to 1."""

    value: float
    error: float | None = None


def score(result: Result, column: Column) -> Score:
    """The score of a column. Raises `ValueError` if the task does not have its metric."""
    metrics = result.metrics[result.task]
    for name, value in metrics.items():
        metric, _, filtered = name.partition(",")
        if metric == column.metric:
            error = metrics.get(f"{metric}_stderr,{filtered}")
            if column.metric in WEIGHTED:
                error = _weighted_error(_values(result, column.metric))
            usable = isinstance(error, float) and math.isfinite(error)
            return Score(float(value), error if usable else None)
    raise ValueError(f"{result.task} gave no {column.metric}, but {', '.join(metrics)}")


def by_difficulty(result: Result, column: Column) -> dict[int, Score]:
    """Accuracy by difficulty of the documents; empty if they have none."""
    groups: dict[int, list[float]] = defaultdict(list)
    for items in result.items.values():
        for item in items:
            if "difficulty" in item and column.metric in item:
                groups[item["difficulty"]].append(float(item[column.metric]))
    return {level: _mean(values) for level, values in sorted(groups.items())}


def average(scores: Sequence[Score]) -> Score:
    """The unweighted mean of independent scores."""
    errors = [score.error for score in scores]
    value = sum(score.value for score in scores) / len(scores)
    if any(error is None for error in errors):
        return Score(value)
    return Score(value, math.sqrt(sum(e * e for e in errors if e is not None)) / len(scores))


def difference(result: Result, base: Result, column: Column) -> Score:
    """`result` minus `base` in one column.

    Both have the same documents, so the error is that of the mean difference per document. If
    documents cannot be paired, the scores are treated as independent.
    """
    ours, theirs = score(result, column), score(base, column)
    value = ours.value - theirs.value
    pairs = list(zip(_values(result, column.metric), _values(base, column.metric), strict=False))
    paired = _mean([float(a) - float(b) for a, b in pairs]) if pairs else Score(math.inf)
    # The values differ if a group weighs tasks equally, independent of their sizes.
    if math.isclose(paired.value, value, abs_tol=1e-9):
        return Score(value, paired.error)
    if ours.error is None or theirs.error is None:
        return Score(value)
    return Score(value, math.hypot(ours.error, theirs.error))


def _values(result: Result, metric: str) -> list[Any]:
    return [item[metric] for items in result.items.values() for item in items if metric in item]


def _mean(values: Sequence[float]) -> Score:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Score(mean)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Score(mean, math.sqrt(variance / len(values)))


def _weighted_error(values: Sequence[Sequence[float]]) -> float | None:
    """Standard error of `exp(-sum of log-likelihoods / sum of weights)` over documents, by the
    delta method for a ratio. lm-evaluation-harness does not compute it."""
    if len(values) < 2:
        return None
    total = sum(weight for _, weight in values)
    rate = -sum(likelihood for likelihood, _ in values) / total
    squares = sum((-likelihood - rate * weight) ** 2 for likelihood, weight in values)
    return math.exp(rate) * math.sqrt(squares * len(values) / (len(values) - 1)) / total


def items_of(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The part of lm-evaluation-harness's samples that a result stores."""
    return {task: [_item(sample) for sample in entries] for task, entries in samples.items()}


def _item(sample: Mapping[str, Any]) -> dict[str, Any]:
    document = sample["doc"] if isinstance(sample["doc"], Mapping) else {}
    item = {
        "doc": sample["doc_id"],
        "hash": sample["doc_hash"],
        "filter": sample["filter"],
        "responses": sample["filtered_resps"],
        **{metric: sample[metric] for metric in sample["metrics"]},
    }
    if isinstance(document.get("difficulty"), int):
        item["difficulty"] = document["difficulty"]
    return item
