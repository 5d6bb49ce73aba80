"""The documents of the tiny tasks, generated when a task is loaded, the same on every machine.

Each task uses another seed of `evaluation_set`, whose items are not used in training. Difficulties
alternate, so that any number of first documents has equally many of each.
"""

import random
from typing import Any

from datasets import Dataset

from vllm_loopus.tiny.tasks import evaluation_set

CHOICES = 4


def questions(seed: int, per_difficulty: int, **_: Any) -> dict[str, Dataset]:
    """Questions with their answers, and four choices that include the answer."""
    rng = random.Random(seed)
    items = evaluation_set(seed, per_difficulty)
    rows = []
    for item in (item for first in range(per_difficulty) for item in items[first::per_difficulty]):
        answers = {other.answer for other in items if other.task == item.task}
        choices = [*rng.sample(sorted(answers - {item.answer}), CHOICES - 1), item.answer]
        rng.shuffle(choices)
        rows.append({**vars(item), "choices": choices, "right": choices.index(item.answer)})
    return {"test": Dataset.from_list(rows)}
