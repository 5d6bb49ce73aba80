"""Held-out texts to measure quality on: conversations of loopus-tiny's tasks, or a file's."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_loopus.tiny.dataset import chat_row
from vllm_loopus.tiny.tasks import EVALUATION_SEEDS, TASKS, conversation


@dataclass(frozen=True)
class Text:
    """Token ids, and which of them count."""

    ids: list[int]
    counts: list[bool]


def conversations(tokenizer: Any, count: int, turns: int, seed: int) -> Iterable[Text]:
    """Held-out conversations of loopus-tiny's tasks; answers count."""
    rng = random.Random(2 * seed + EVALUATION_SEEDS)
    for index in range(count):
        items = conversation(TASKS[index % len(TASKS)], turns, rng)
        ids: list[int] = []
        counts: list[bool] = []
        messages = chat_row(items)["messages"]
        for turn in range(0, len(messages), 2):
            asked = tokenizer.apply_chat_template(
                messages[turn : turn + 1], tokenize=False, add_generation_prompt=True
            )
            question = tokenizer.encode(asked, add_special_tokens=False)
            answer = tokenizer.encode(messages[turn + 1]["content"], add_special_tokens=False)
            ids += [*question, *answer, tokenizer.eos_token_id]
            counts += [False] * len(question) + [True] * len(answer) + [False]
        yield Text(ids, counts)


def texts_of(file: Path, tokenizer: Any, limit: int) -> Iterable[Text]:
    """Lines of a file; every token after the first counts."""
    for line in file.read_text().splitlines():
        ids = tokenizer.encode(json.loads(line)["text"])[:limit]
        if len(ids) > 1:
            yield Text(ids, [False] + [True] * (len(ids) - 1))
