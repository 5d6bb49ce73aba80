"""Numbers of the table: errors against simulation, averages and differences by hand."""

import json
import math
import random
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest

from vllm_loopus.evaluation.columns import PAPER, TINY, Column, column_of, expand
from vllm_loopus.evaluation.published import published_row, published_rows
from vllm_loopus.evaluation.scores import Score, average, by_difficulty, difference, score
from vllm_loopus.evaluation.store import Result
from vllm_loopus.evaluation.table import markdown
from vllm_loopus.evaluation.tasks import load_tasks

ACCURACY = Column("Choice", "task", "acc")


def result(values: list[Any], metric: str = "acc", **metrics: Any) -> Result:
    items = [{metric: value, "difficulty": 1 + i % 2} for i, value in enumerate(values)]
    return Result({}, "task", "model", "2 loops", {"task": metrics}, {"task": items}, 1.0)


def test_score() -> None:
    found = score(result([1, 0], **{"acc,none": 0.5, "acc_stderr,none": 0.25}), ACCURACY)
    assert found == Score(0.5, 0.25)
    assert score(result([1], **{"acc,none": 1, "acc_stderr,none": "N/A"}), ACCURACY) == Score(1.0)
    assert (
        score(result([1], **{"acc,none": 1, "acc_stderr,none": math.nan}), ACCURACY).error is None
    )
    with pytest.raises(ValueError, match="task gave no acc, but f1,none"):
        score(result([1], **{"f1,none": 1.0}), ACCURACY)


def test_the_error_of_a_weighted_perplexity() -> None:
    """As when documents are drawn again and again."""
    rng = random.Random(1)
    documents = [(-w * rng.uniform(1.5, 2.5), w) for w in rng.choices(range(5, 60), k=120)]

    def perplexity(chosen: list[tuple[float, int]]) -> float:
        return math.exp(-sum(x for x, _ in chosen) / sum(w for _, w in chosen))

    draws = [perplexity(rng.choices(documents, k=120)) for _ in range(2000)]
    metric = "byte_perplexity"
    given = result(documents, metric, **{f"{metric},none": perplexity(documents)})
    found = score(given, Column("Text", "task", metric))
    assert found.value == perplexity(documents)
    assert found.error == pytest.approx(stdev(draws), rel=0.1)


def test_differences_are_paired() -> None:
    ours = result([1, 1, 1, 0], **{"acc,none": 0.75, "acc_stderr,none": 0.25})
    theirs = result([1, 1, 0, 0], **{"acc,none": 0.5, "acc_stderr,none": 0.289})
    assert difference(ours, theirs, ACCURACY) == Score(0.25, pytest.approx(0.25))
    # A group that weighs its tasks otherwise than by size cannot be paired.
    ours.metrics["task"]["acc,none"] = 0.8
    found = difference(ours, theirs, ACCURACY)
    assert found == Score(pytest.approx(0.3), pytest.approx(math.hypot(0.25, 0.289)))


def test_averages_and_difficulties() -> None:
    assert average([Score(0.2, 0.03), Score(0.4, 0.04)]) == Score(
        pytest.approx(0.3), pytest.approx(0.025)
    )
    assert average([Score(0.2), Score(0.4, 0.04)]).error is None
    found = by_difficulty(result([1, 0, 1, 1]), ACCURACY)
    assert found == {1: Score(1.0, 0.0), 2: Score(0.5, 0.5)}


@pytest.mark.parametrize("row", published_rows(), ids=lambda row: row.base)
def test_published_averages(row: Any) -> None:
    """The paper's own AVG is the mean of the accuracies."""
    averages = {
        "Qwen3-1.7B": (53.7, 55.3),
        "Qwen3-4B": (60.3, 62.1),
        "Qwen3-8B": (63.2, 65.4),
        "phi-4": (67.0, 68.6),
        "TinyLlama": (43.1, 49.4),
    }
    titles = [column.title for column in PAPER.columns if not column.is_perplexity]
    for numbers, given in zip((row.before, row.after), averages[row.base], strict=True):
        shown = [numbers[title] for title in titles if title in numbers]
        assert sum(shown) / len(shown) == pytest.approx(given, abs=0.1)


def test_published_rows_are_found_by_the_base() -> None:
    assert published_row("Qwen/Qwen3-4B").after["OBQA"] == 34.4
    assert published_row("/models/qwen3-1.7b").base == "Qwen3-1.7B"
    assert published_row("TinyLlama/TinyLlama-1.1B-Chat-v1.0").normalised
    with pytest.raises(ValueError, match="no row for the base 'Qwen/Qwen3-14B'"):
        published_row("Qwen/Qwen3-14B")


def test_columns() -> None:
    assert expand(["tiny", "arc_easy"])[0] == [c.task for c in TINY.columns] + ["arc_easy"]
    assert expand(["paper"]) == ([c.task for c in PAPER.columns], 1024)
    assert column_of("arc_easy", [], normalised=True) == Column("ARC-E", "arc_easy", "acc_norm")
    assert column_of("winogrande", [], normalised=True) == Column("WG", "winogrande", "acc")
    assert column_of("gsm8k", ["exact_match"]) == Column("gsm8k", "gsm8k", "exact_match")
    assert column_of("c4", ["byte_perplexity", "word_perplexity"]).metric == "word_perplexity"
    assert column_of("odd", ["beauty"]) is None
    assert markdown(["a", "b"], [["1", ""]]) == "| a | b |\n| --- | --- |\n| 1 |  |"


def test_the_tiny_tasks() -> None:
    """Fixed documents with difficulties in turn; four choices with the answer among them."""
    names = [column.task for column in TINY.columns]
    tasks = load_tasks(names)
    assert [task.fingerprint(None) for task in tasks] == [
        task.fingerprint(None) for task in load_tasks(names)
    ]
    assert tasks[0].fingerprint(3) != tasks[0].fingerprint(4)
    for task in tasks:
        documents = list(task.leaves[0].eval_docs)
        kinds = {(d["task"], d["difficulty"]) for d in documents}
        first = documents[: len(kinds)]
        assert {(d["task"], d["difficulty"]) for d in first} == kinds
        for document in documents:
            assert document["choices"][document["right"]] == document["answer"]
            assert len(set(document["choices"])) == 4
    questions = [{d["question"] for d in task.leaves[0].eval_docs} for task in tasks]
    assert len(set.union(*questions)) > len(questions[0])  # each task has items of its own


def test_groups_and_tags(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [tiny_choice, tiny_last_word]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "a b"}) + "\n")
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            f"tag: tagged\ntask: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: '{rows}'}}}}\ntest_split: test\n"
            "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
            "metric_list: [{metric: word_perplexity}]\n"
        )
    (group,) = load_tasks(["both"], include=tmp_path)
    assert [leaf.task_name for leaf in group.leaves] == ["tiny_choice", "tiny_last_word"]
    assert "acc" in group.metrics
    assert [task.name for task in load_tasks(["tagged"], include=tmp_path)] == ["one", "two"]
