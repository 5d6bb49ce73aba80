"""Training data of `loopus-tiny` as JSON lines, in the forms that `vllm-loopus train` reads."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_loopus.tiny.tasks import (
    MAX_DIFFICULTY,
    TASKS,
    Item,
    conversation,
    evaluation_set,
    training_rng,
)

Row = dict[str, Any]

CHAT_SHARE = 0.4  # of the rows; the others are single questions
BARE_SHARE = 0.5  # of single questions come without their "="
TURNS = 3  # of a conversation
CURRICULUM_SHARE = 0.6
HELD_OUT_SEED = 1000  # of the items looked at during training


def training_rows(rng: random.Random, hardest: Iterable[int]) -> Iterator[Row]:
    """A row for each entry of `hardest`, tasks in turn: a chat or a single question, of
    difficulties from 1 to the entry."""
    for index, limit in enumerate(hardest):
        task = TASKS[index % len(TASKS)]
        chat = rng.random() < CHAT_SHARE
        items = conversation(task, TURNS if chat else 1, rng, hardest=limit)
        yield chat_row(items) if chat else single_row(items[0], rng.random() < BARE_SHARE)


def chat_row(items: Iterable[Item]) -> Row:
    """A conversation in which every item is asked and answered."""
    messages = []
    for item in items:
        messages.append({"role": "user", "content": item.question})
        messages.append({"role": "assistant", "content": item.answer})
    return {"messages": messages}


def single_row(item: Item, bare: bool = False) -> Row:
    """One question as it stands, or bare, without the `=` at its end."""
    question = item.question.removesuffix("=") if bare else item.question
    return {"prompt": question, "completion": item.answer}


def all_difficulties(count: int) -> Iterator[int]:
    """No curriculum: every row may be as hard as any."""
    return (MAX_DIFFICULTY for _ in range(count))


def curriculum(count: int) -> Iterator[int]:
    """The hardest difficulty of each of `count` rows. It rises with the square of the way done, so
    that single steps are learnt first, until `CURRICULUM_SHARE` of the rows."""
    for index in range(count):
        done = min(1.0, index / (CURRICULUM_SHARE * count))
        yield 1 + int(done**2 * (MAX_DIFFICULTY - 1))


def write_rows(file: Path, rows: Iterable[Row], total: int) -> None:
    """Write JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for row in tqdm(rows, total=total, desc=file.name):
            out.write(json.dumps(row) + "\n")


def write_all(folder: Path, base: int, post: int, held_out: int, seed: int = 0) -> None:
    """`base.jsonl` (`base` rows, easy first), `post.jsonl` (`post` rows of all difficulties) and
    `held-out.jsonl` (`held_out` items of each task and difficulty, single questions)."""
    first, second = training_rng(seed), training_rng(seed + 1)
    write_rows(folder / "base.jsonl", training_rows(first, curriculum(base)), base)
    write_rows(folder / "post.jsonl", training_rows(second, all_difficulties(post)), post)
    items = evaluation_set(HELD_OUT_SEED, held_out)
    write_rows(folder / "held-out.jsonl", map(single_row, items), len(items))
