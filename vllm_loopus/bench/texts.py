"""Held-out texts to measure quality on: conversations of loopus-tiny's tasks, or a file's."""

import json
import random
from argparse import ArgumentParser, Namespace
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


def add_options(parser: ArgumentParser) -> None:
    """The options of a script that measures a model on texts."""
    parser.add_argument("--model", default="loopus-tiny")
    parser.add_argument("--texts", type=Path, help="JSON lines with text")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a text at most")
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=2)


def chosen_texts(parser: ArgumentParser, args: Namespace, tokenizer: Any) -> list[Text]:
    """The texts that the options say. Ends the script if there are none."""
    if not args.texts:
        return list(conversations(tokenizer, args.conversations, args.turns, args.seed))
    if not (texts := list(texts_of(args.texts, tokenizer, args.max_length))):
        parser.error(f"--texts {args.texts} has no line with more than one token")
    return texts


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
