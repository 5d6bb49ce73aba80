"""The synthetic multi-step tasks of `loopus-tiny`, whose items have a known difficulty k.

- `swaps`: a ball is under one of four cups, and k pairs of cups are swapped one after the other:
  `b:ab,cd=` has k = 2 and the answer `a`.
- `arithmetic`: k operations on digits, from left to right without precedence, with every result
  modulo 10: `3+2*3=` has k = 2 and the answer `5`.

Intermediate steps are not written out, so the model has to compute them internally. Every prefix of
a question is a question too, so that each additional step is the same kind of step.
"""

import random
from dataclasses import dataclass

TASKS = ("swaps", "arithmetic")
MAX_DIFFICULTY = 8
CUPS = "abcd"
# Each operation is a permutation of the ten digits, so that the answer depends on all steps. Small
# operands make the tables of the operations easy to learn.
OPERANDS = {"+": "012", "-": "012", "*": "13"}
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
# Training uses even seeds of `random.Random` and evaluation odd ones, so that they never draw the
# same random numbers.
TRAIN_SEEDS, EVALUATION_SEEDS = 0, 1


@dataclass(frozen=True)
class Item:
    """One question with its answer. `difficulty`: the number of steps k."""

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
    """`turns` items of `task` with difficulties k from 1 to `hardest`, drawn with weights 1/k."""
    levels = range(1, hardest + 1)
    chosen = rng.choices(levels, weights=[1 / k for k in levels], k=turns)
    return [generate(task, k, rng) for k in chosen]


def evaluation_set(seed: int, per_difficulty: int) -> list[Item]:
    """`per_difficulty` items for each task and difficulty, with seeds not used in training."""
    rng = random.Random(2 * seed + EVALUATION_SEEDS)
    return [
        generate(task, difficulty, rng)
        for task in TASKS
        for difficulty in range(1, MAX_DIFFICULTY + 1)
        for _ in range(per_difficulty)
    ]


def training_rng(seed: int) -> random.Random:
    """A random number generator with a seed not used in evaluation."""
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
