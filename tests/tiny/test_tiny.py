"""The synthetic tasks, the data, and what the embedded `loopus-tiny` learned."""

import json
import random
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.tiny.dataset import chat_row, curriculum, single_row, training_rows
from vllm_loopus.tiny.evaluate import evaluate, load, markdown, standard_error
from vllm_loopus.tiny.scores import score
from vllm_loopus.tiny.tasks import MAX_DIFFICULTY, TASKS, evaluation_set, generate, training_rng
from vllm_loopus.tiny.tokenizer import build_tokenizer


def solve(question: str) -> tuple[str, int]:
    """Answer and number of steps, worked out from the text alone."""
    if ":" in question:
        place, swaps = question.removesuffix("=").split(":")
        for pair in (steps := swaps.split(",")):
            if place in pair:
                place = pair.replace(place, "")
        return place, len(steps)
    value = int(question[0])
    steps = re.findall(r"([-+*])(\d)", question)
    for symbol, operand in steps:
        value = eval(f"value {symbol} {operand}") % 10
    return str(value), len(steps)


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    rng = random.Random(5)
    for difficulty in range(1, MAX_DIFFICULTY + 1):
        for _ in range(50):
            item = generate(task, difficulty, rng)
            assert solve(item.question) == (item.answer, item.difficulty)
            assert item.difficulty == difficulty


def test_rows_are_questions_with_their_answers() -> None:
    rows = list(training_rows(training_rng(3), [2, 8] * 200))
    assert rows == list(training_rows(training_rng(3), [2, 8] * 200))
    hardest = {0: 0, 1: 0}
    forms = set()
    for index, row in enumerate(rows):
        if "messages" in row:
            turns = row["messages"]
            asked = [(q["content"], a["content"]) for q, a in zip(*[iter(turns)] * 2, strict=True)]
            assert {q["role"] for q in turns[::2]} == {"user"}
            assert {a["role"] for a in turns[1::2]} == {"assistant"}
        else:
            asked = [(row["prompt"], row["completion"])]
            forms.add(row["prompt"][-1] == "=")
        for question, answer in asked:
            right, steps = solve(question)
            assert answer == right
            hardest[index % 2] = max(hardest[index % 2], steps)
    assert hardest == {0: 2, 1: 8}
    assert forms == {True, False}


def test_the_curriculum_rises_to_the_end() -> None:
    levels = list(curriculum(1000))
    assert levels == sorted(levels)
    assert set(levels) == set(range(1, MAX_DIFFICULTY + 1))
    assert levels[:200] == [1] * 200 and levels[-400:] == [8] * 400


def test_evaluation_items_are_their_own() -> None:
    items = evaluation_set(seed=0, per_difficulty=20)
    assert items == evaluation_set(seed=0, per_difficulty=20)
    assert len(items) == len(TASKS) * MAX_DIFFICULTY * 20
    hard = {item.question for item in items if item.difficulty >= 7}
    rows = islice(training_rows(training_rng(0), [8] * 4000), 4000)
    trained = {row["prompt"] for row in rows if "prompt" in row}
    assert not hard & trained


@pytest.mark.parametrize(
    ("task", "difficulty", "message"),
    [("swaps", 0, "difficulty=0"), ("swaps", 9, "difficulty=9"), ("poetry", 1, "task='poetry'")],
)
def test_bad_arguments(task: str, difficulty: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(task, difficulty, random.Random(0))


def test_tokenizer(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "ab c  (1+2)*3 = ?\n  <x> "
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "1+1"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<|user|>1+1<|end|><|assistant|>"
    assert len(tokenizer.encode(chat)) == 6
    assert tokenizer.unk_token_id in tokenizer.encode("é")


def test_prepare_writes_everything_or_nothing(tmp_path: Path, monkeypatch) -> None:
    import typer

    from vllm_loopus.tiny import dataset, prepare

    app = typer.Typer()
    app.command()(prepare.main)
    arguments = ["--out", str(tmp_path / "runs"), "--base-rows", "40", "--post-rows", "30"]
    result = CliRunner().invoke(app, [*arguments, "--held-out", "2"])
    assert result.exit_code == 0, result.output
    assert AutoConfig.from_pretrained(tmp_path / "runs" / "start").model_type == "qwen3"
    data = tmp_path / "runs" / "data"
    lines = {file.name: len(file.read_text().splitlines()) for file in data.iterdir()}
    assert lines == {
        "base.jsonl": 40,
        "post.jsonl": 30,
        "held-out.jsonl": 2 * len(TASKS) * MAX_DIFFICULTY,
    }

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "exists" in result.output

    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(dataset, "write_rows", fail)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "other"), "--base-rows", "4"])
    assert result.exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_row_forms() -> None:
    items = evaluation_set(seed=0, per_difficulty=1)[:2]
    assert json.loads(json.dumps(chat_row(items)))["messages"][1]["content"] == items[0].answer
    assert single_row(items[0])["prompt"].endswith("=")
    assert not single_row(items[0], bare=True)["prompt"].endswith("=")


def test_scores_are_those_of_the_reference() -> None:
    model, tokenizer = load(EMBEDDED["loopus-tiny"])
    items = evaluation_set(seed=5, per_difficulty=2)
    scores = score(model, tokenizer, items)
    depths = scores.exit_depths(HaltingRule.from_config(model.config))
    right, losses = scores.at(depths)
    for i, item in enumerate(items):
        output = model(torch.tensor([tokenizer.encode(item.question)]))
        answer = tokenizer.encode(item.answer)[0]
        assert output.exit_depths.item() == depths[i]
        log_probability = output.logits[0, -1].log_softmax(-1)[answer]
        assert -log_probability.item() == pytest.approx(losses[i].item(), abs=1e-4)
        assert bool(right[i]) == (output.logits[0, -1].argmax() == answer)


def test_the_embedded_model_refines() -> None:
    """On items that neither its training nor its card used: better than its base, better with
    loops, deeper where it is harder, and early exit costs next to nothing."""
    result = evaluate(EMBEDDED["loopus-tiny"], {"base": EMBEDDED["loopus-tiny-base"]}, 100, seed=7)
    looped, base = result["looped"], result["plain"]["base"]
    by_depth = [numbers["accuracy"] for numbers in looped["by_depth"]]
    full = by_depth[-1]
    margin = 3 * (base["standard_error"] ** 2 + standard_error(full, result["items"]) ** 2) ** 0.5
    assert full > base["accuracy"] + margin
    assert by_depth[:4] == sorted(by_depth[:4]) and by_depth[3] > by_depth[0] + margin
    exit_ = looped["early_exit"][str(looped["default_threshold"])]
    assert exit_["accuracy"] > full - 0.01
    assert exit_["mean_exit_depth"] <= 0.6 * looped["max_loops"]
    for counts in exit_["exit_depths"].values():
        means = [sum(d * n for d, n in enumerate(row, 1)) / sum(row) for row in counts]
        easy, middle, hard = means[0], sum(means[2:5]) / 3, sum(means[6:]) / 2
        assert easy < middle < hard
    assert "| base |" in markdown(result)
