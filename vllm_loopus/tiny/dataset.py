"""The training data of `loopus-tiny` as JSON lines, in the format of `vllm-loopus train`."""

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

CHAT_SHARE = 0.4  # share of the rows that are chats; the others are single questions
BARE_SHARE = 0.5  # share of the single questions without their "="
TURNS = 3  # of a conversation
CURRICULUM_SHARE = 0.6
HELD_OUT_SEED = 1000  # of the items that are evaluated during training


def training_rows(rng: random.Random, hardest: Iterable[int]) -> Iterator[Row]:
    """A chat or a single question for each entry of `hardest`, which is its maximum difficulty.

    The tasks alternate.
    """
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
    """One question; without the `=` at its end if `bare`."""
    question = item.question.removesuffix("=") if bare else item.question
    return {"prompt": question, "completion": item.answer}


def all_difficulties(count: int) -> Iterator[int]:
    """The maximum difficulty of each of `count` rows without a curriculum."""
    return (MAX_DIFFICULTY for _ in range(count))


def curriculum(count: int) -> Iterator[int]:
    """The maximum difficulty of each of `count` rows with a curriculum.

    It increases with the square of the progress until `CURRICULUM_SHARE` of the rows, so that
    single steps are learnt first.
    """
    for index in range(count):
        done = min(1.0, index / (CURRICULUM_SHARE * count))
        yield 1 + int(done**2 * (MAX_DIFFICULTY - 1))


def write_rows(file: Path, rows: Iterable[Row], total: int) -> None:
    """Writes rows as JSON lines, with a progress bar."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
        for row in tqdm(rows, total=total, desc=file.name):
            out.write(json.dumps(row) + "\n")


def write_all(folder: Path, base: int, post: int, held_out: int, seed: int = 0) -> None:
    """Writes `base.jsonl` (`base` rows, easy first), `post.jsonl` (`post` rows of all difficulties)
    and `held-out.jsonl` (`held_out` single questions of each task and difficulty)."""
    first, second = training_rng(seed), training_rng(seed + 1)
    write_rows(folder / "base.jsonl", training_rows(first, curriculum(base)), base)
    write_rows(folder / "post.jsonl", training_rows(second, all_difficulties(post)), post)
    items = evaluation_set(HELD_OUT_SEED, held_out)
    write_rows(folder / "held-out.jsonl", map(single_row, items), len(items))
