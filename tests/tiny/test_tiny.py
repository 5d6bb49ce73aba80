"""The synthetic task, the tokenizer and the training command of `loopus-tiny`."""

import random
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.tiny.pretrain import accuracy, pretrain
from vllm_loopus.tiny.tasks import (
    MAX_DIFFICULTY,
    TASKS,
    Item,
    conversations,
    evaluation_set,
    generate,
)
from vllm_loopus.tiny.tokenizer import build_tokenizer


def solve(question: str, earlier: str = "") -> tuple[str, int]:
    """Answer and number of steps, worked out from the text alone."""
    if question.endswith("="):
        operations = len(re.findall(r"[-+*]", question))
        text = question[:-1]
        while not text.isdigit():  # innermost first, each result modulo 10
            text = re.sub(r"\((\d[-+*]\d)\)", lambda match: str(eval(match[1]) % 10), text)
        return text, operations
    arrows = dict(re.findall(r"\b([a-z])([a-z])\b", earlier + question))
    steps, at = int(question[-2]), question[-1]
    for _ in range(steps):
        at = arrows[at]
    return at, steps


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    rng = random.Random(5)
    for difficulty in range(1, MAX_DIFFICULTY + 1):
        for _ in range(50):
            item = generate(task, difficulty, rng)
            assert solve(item.question) == (item.answer, item.difficulty)
            assert item.difficulty == difficulty


@pytest.mark.parametrize("task", TASKS)
def test_conversations(task: str) -> None:
    for items in islice(conversations(3, task, turns=4, max_difficulty=3), 50):
        assert len(items) == 4
        for item in items:
            earlier = items[0].question + " " if item is not items[0] else ""
            assert solve(item.question, earlier) == (item.answer, item.difficulty)
            assert item.difficulty <= 3
    first, again = (list(islice(conversations(3, task, 4), 5)) for _ in range(2))
    assert first == again


def test_evaluation_items_are_their_own() -> None:
    items = evaluation_set(seed=0, per_difficulty=20)
    assert items == evaluation_set(seed=0, per_difficulty=20)
    assert len(items) == len(TASKS) * MAX_DIFFICULTY * 20
    trained = {items[0].question for items in islice(conversations(0, "lookup", 1), 2000)}
    assert not trained & {item.question for item in items if item.task == "lookup"}


@pytest.mark.parametrize(
    ("task", "difficulty", "message"),
    [("lookup", 0, "difficulty=0"), ("lookup", 5, "difficulty=5"), ("poetry", 1, "task='poetry'")],
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


def test_pretrain_writes_a_checkpoint_once(tmp_path: Path) -> None:
    arguments = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}
    pretrain(tmp_path / "base", per_difficulty=1, **arguments)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.model_type == "qwen3"
    assert AutoTokenizer.from_pretrained(tmp_path / "base").eos_token == "<|end|>"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    with pytest.raises(FileExistsError, match="choose another folder"):
        pretrain(tmp_path / "base", per_difficulty=1, **arguments)


def test_the_embedded_model_was_trained() -> None:
    """At one loop it still knows more than a guess: 1/7 for lookups, about 1/10 for digits."""
    folder = EMBEDDED["loopus-tiny"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.update({"max_loops": 1})
    items: list[Item] = [i for i in evaluation_set(seed=0, per_difficulty=50) if i.difficulty == 1]
    shares = accuracy(model, AutoTokenizer.from_pretrained(folder), items)
    assert shares["arithmetic", 1] > 0.25
    assert shares["lookup", 1] > 0.25
