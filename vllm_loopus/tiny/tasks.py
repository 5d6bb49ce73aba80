"""The synthetic multi-step task that `loopus-tiny` learns: every item has a known difficulty k.

- `lookup`: pairs of letters are arrows of a permutation, in random order; follow k arrows.
  `da bc ab cd 2a` (here with 4 letters) asks for a -> b -> c, so the answer is `c`.
- `arithmetic`: k operations on digits, nested, every result taken modulo 10.
  `((3+4)*2)=` has k = 2 and the answer `4`.

Nothing between question and answer is written out: more steps must happen inside the model.
"""

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

TASKS = ("lookup", "arithmetic")
MAX_DIFFICULTY = 4
# No way back is shorter than k steps forward: NUM_LETTERS - k >= k.
NUM_LETTERS = 8
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
# Training uses the even seeds of `random.Random`, evaluation the odd ones: no evaluation draws the
# numbers of a training run.
TRAIN_SEEDS, EVALUATION_SEEDS = 0, 1


@dataclass(frozen=True)
class Item:
    """One question with its only right answer. `difficulty` is the number of steps k."""

    task: str
    question: str
    answer: str
    difficulty: int


def generate(task: str, difficulty: int, rng: random.Random) -> Item:
    """One item. Raises `ValueError` for an unknown task or a difficulty outside 1..4."""
    if not 1 <= difficulty <= MAX_DIFFICULTY:
        raise ValueError(f"difficulty={difficulty} must be from 1 to {MAX_DIFFICULTY}")
    if task == "lookup":
        return _lookup(difficulty, rng, _cycle(rng))
    if task == "arithmetic":
        text, value = _expression(difficulty, rng)
        return Item(task, f"{text}=", str(value), difficulty)
    raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}")


def conversations(
    seed: int, task: str, turns: int, max_difficulty: int = MAX_DIFFICULTY
) -> Iterator[list[Item]]:
    """Lists of `turns` items of `task` for training, without end, the same for the same arguments.

    Later lookups ask about the map of the first question and give their start alone (`3b`); half of
    the maps are written twice, which teaches to look arrows up. Easy items are drawn more often:
    difficulty k with weight 1/k.
    """
    rng = random.Random(2 * seed + TRAIN_SEEDS)
    levels = range(1, max_difficulty + 1)
    while True:
        chosen = rng.choices(levels, weights=[1 / k for k in levels], k=turns)
        if task == "lookup":
            cycle = _cycle(rng)
            copies = rng.randint(1, 2)
            yield [
                _lookup(k, rng, cycle, copies if turn == 0 else 0) for turn, k in enumerate(chosen)
            ]
        else:
            yield [generate(task, k, rng) for k in chosen]


def evaluation_set(seed: int, per_difficulty: int) -> list[Item]:
    """`per_difficulty` items for each task and difficulty, drawn as no training run draws."""
    rng = random.Random(2 * seed + EVALUATION_SEEDS)
    return [
        generate(task, difficulty, rng)
        for task in TASKS
        for difficulty in range(1, MAX_DIFFICULTY + 1)
        for _ in range(per_difficulty)
    ]


def _cycle(rng: random.Random) -> list[str]:
    """One cycle through all letters: k steps do not come back to the start for k < NUM_LETTERS."""
    return rng.sample(string.ascii_lowercase[:NUM_LETTERS], NUM_LETTERS)


def _lookup(difficulty: int, rng: random.Random, cycle: list[str], copies: int = 1) -> Item:
    start = rng.randrange(NUM_LETTERS)
    arrows = [a + b for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
    written = [arrow for _ in range(copies) for arrow in rng.sample(arrows, NUM_LETTERS)]
    question = " ".join([*written, f"{difficulty}{cycle[start]}"])
    return Item("lookup", question, cycle[(start + difficulty) % NUM_LETTERS], difficulty)


def _expression(operations: int, rng: random.Random) -> tuple[str, int]:
    if operations == 0:
        digit = rng.randint(0, 9)
        return str(digit), digit
    left = rng.randint(0, operations - 1)
    (left_text, a), (right_text, b) = (
        _expression(left, rng),
        _expression(operations - 1 - left, rng),
    )
    symbol = rng.choice(list(OPERATORS))
    return f"({left_text}{symbol}{right_text})", OPERATORS[symbol](a, b) % 10
