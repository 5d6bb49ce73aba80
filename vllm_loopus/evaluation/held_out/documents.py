"""The documents of the held-out tasks, made from texts of your own that no training has seen.

`vllm-loopus eval --held-out FILE` names the file: JSON lines with `text`. Every answer is right by
construction: it is the word or the ending that stands in the text. The same file gives the same
documents.
"""

import json
import os
import random
import re
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

HELD_OUT = "VLLM_LOOPUS_HELD_OUT"  # the file
SEED = 20261130
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
WORD = re.compile(r"[A-Za-z]{4,}")
WORDS = 30, 120  # of a passage
ENDING = 8  # words of the ending of a cloze choice
CHOICES = 4


def passages() -> Iterator[str]:
    """Runs of whole sentences from one paragraph, with ordinary spaces, in an order that mixes
    documents."""
    with open(os.environ[HELD_OUT]) as file:
        texts = [json.loads(line)["text"] for line in file if line.strip()]
    found = []
    for document in texts:
        for paragraph in document.split("\n\n"):
            sentences = SENTENCE.split(" ".join(paragraph.split()))
            passage: list[str] = []
            for sentence in sentences:
                passage += sentence.split()
                if len(passage) >= WORDS[0]:
                    break
            whole = bool(passage) and passage[-1][-1] in ".!?"
            if whole and WORDS[0] <= len(passage) <= WORDS[1]:
                found.append(" ".join(passage))
    random.Random(SEED).shuffle(found)
    if not found:
        raise ValueError(
            f"held_out: {os.environ[HELD_OUT]} has no paragraph of {WORDS[0]} to {WORDS[1]} words "
            "that ends with a sentence"
        )
    yield from dict.fromkeys(found)


def text(**_: Any) -> dict[str, Dataset]:
    """Whole passages."""
    return {"test": Dataset.from_list([{"text": passage} for passage in passages()])}


def last_words(**_: Any) -> dict[str, Dataset]:
    """Passages without their last word, which occurs earlier in them."""
    rows = []
    for passage in passages():
        context, last = passage.rsplit(" ", 1)
        word = last.rstrip(".!?\"')")
        if WORD.fullmatch(word) and re.search(rf"\b{word}\b", context):
            rows.append({"context": context, "word": word})
    return {"test": Dataset.from_list(rows)}


def choices(**_: Any) -> dict[str, Dataset]:
    """Passages without their ending, the ending, and the endings of three other passages."""
    rng = random.Random(SEED)
    split = [passage.split() for passage in passages()]
    endings = [" ".join(words[-ENDING:]) for words in split]
    rows = []
    for index, words in enumerate(split):
        others = [ending for ending in dict.fromkeys(endings) if ending != endings[index]]
        offered = [endings[index], *rng.sample(others, min(CHOICES - 1, len(others)))]
        rng.shuffle(offered)
        row = {"context": " ".join(words[:-ENDING]), "choices": offered}
        rows.append(row | {"right": offered.index(endings[index])})
    return {"test": Dataset.from_list(rows)}
