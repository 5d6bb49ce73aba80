"""The synthetic multi-step tasks that `loopus-tiny` learns: every item has a known difficulty k.

- `swaps`: a ball lies under one of four cups, k pairs of cups are swapped one after the other:
  `b:ab,cd=` has k = 2 and the answer `a`.
- `arithmetic`: a pocket calculator of one digit. k operations, left to right without precedence,
  every result taken modulo 10: `3+2*3=` has k = 2 and the answer `5`.

Nothing between question and answer is written out: more steps must happen inside the model. Every
beginning of a question is a question itself, so that one step more is the same step again.
"""

import random
from dataclasses import dataclass

TASKS = ("swaps", "arithmetic")
MAX_DIFFICULTY = 8
CUPS = "abcd"
# Each operation permutes the ten digits: no step forgets what was before it. Small steps, some of
# them none at all, make the tables of the operations quick to learn.
OPERANDS = {"+": "012", "-": "012", "*": "13"}
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
    """One item. Raises `ValueError` for an unknown task or a difficulty outside 1..8."""
    if not 1 <= difficulty <= MAX_DIFFICULTY:
        raise ValueError(f"difficulty={difficulty} must be from 1 to {MAX_DIFFICULTY}")
    if task == "swaps":
        return _swaps(difficulty, rng)
    if task == "arithmetic":
        return _arithmetic(difficulty, rng)
    raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}")


def conversation(
    task: str,
    turns: int,
    rng: random.Random,
    hardest: int = MAX_DIFFICULTY,
) -> list[Item]:
    """`turns` items of `task`, of difficulties 1 to `hardest`: k is drawn with weight 1/k."""
    levels = range(1, hardest + 1)
    chosen = rng.choices(levels, weights=[1 / k for k in levels], k=turns)
    return [generate(task, k, rng) for k in chosen]


def evaluation_set(seed: int, per_difficulty: int) -> list[Item]:
    """`per_difficulty` items for each task and difficulty, drawn as no training run draws."""
    rng = random.Random(2 * seed + EVALUATION_SEEDS)
    return [
        generate(task, difficulty, rng)
        for task in TASKS
        for difficulty in range(1, MAX_DIFFICULTY + 1)
        for _ in range(per_difficulty)
    ]


def training_rng(seed: int) -> random.Random:
    """A source of random numbers that no evaluation set uses."""
    return random.Random(2 * seed + TRAIN_SEEDS)


def _swaps(difficulty: int, rng: random.Random) -> Item:
    start = place = rng.choice(CUPS)
    swaps = []
    for _ in range(difficulty):
        one, other = rng.sample(CUPS, 2)
        swaps.append(one + other)
        place = {one: other, other: one}.get(place, place)
    return Item("swaps", f"{start}:{','.join(swaps)}=", place, difficulty)


def _arithmetic(difficulty: int, rng: random.Random) -> Item:
    value = rng.randint(0, 9)
    text = str(value)
    for _ in range(difficulty):
        symbol = rng.choice(list(OPERATORS))
        operand = rng.choice(OPERANDS[symbol])
        text += symbol + operand
        value = OPERATORS[symbol](value, int(operand)) % 10
    return Item("arithmetic", f"{text}=", str(value), difficulty)
