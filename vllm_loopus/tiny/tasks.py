"""The synthetic multi-step task that `loopus-tiny` learns: every item has a known difficulty k.

- `lookup`: pairs of letters are arrows of a permutation, in random order; follow k arrows.
  `da bc ab cd a2=` (here with 4 letters) asks for a -> b -> c, so the answer is `c`.
- `arithmetic`: k operations on digits, nested, every result taken modulo 10.
  `((3+4)*2)=` has k = 2 and the answer `4`.

Nothing between question and answer is written out: more steps must happen inside the model.
"""

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TASKS = ("lookup", "arithmetic")
MAX_DIFFICULTY = 6
NUM_LETTERS = 7
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
# Seeds of `stream` are spread over the even numbers and those of `evaluation_set` over the odd
# ones, so that no evaluation draws the numbers of a training run.
TRAIN_SEEDS, EVALUATION_SEEDS = 0, 1


@dataclass(frozen=True)
class Item:
    """One question with its only right answer. `difficulty` is the number of steps k."""

    task: str
    question: str
    answer: str
    difficulty: int


def generate(task: str, difficulty: int, rng: random.Random) -> Item:
    """One item. Raises `ValueError` for an unknown task or a difficulty outside 1..6."""
    if not 1 <= difficulty <= MAX_DIFFICULTY:
        raise ValueError(f"difficulty={difficulty} must be from 1 to {MAX_DIFFICULTY}")
    if task == "lookup":
        return _lookup(difficulty, rng)
    if task == "arithmetic":
        text, value = _expression(difficulty, rng)
        return Item(task, f"{text}=", str(value), difficulty)
    raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}")


def stream(
    seed: int, tasks: Sequence[str] = TASKS, max_difficulty: int = MAX_DIFFICULTY
) -> Iterator[Item]:
    """Items for training without end, the same for the same arguments."""
    rng = random.Random(2 * seed + TRAIN_SEEDS)
    while True:
        yield generate(rng.choice(tasks), rng.randint(1, max_difficulty), rng)


def evaluation_set(seed: int, per_difficulty: int) -> list[Item]:
    """`per_difficulty` items for each task and difficulty; never the items of `stream`'s seeds."""
    rng = random.Random(2 * seed + EVALUATION_SEEDS)
    return [
        generate(task, difficulty, rng)
        for task in TASKS
        for difficulty in range(1, MAX_DIFFICULTY + 1)
        for _ in range(per_difficulty)
    ]


def _lookup(difficulty: int, rng: random.Random) -> Item:
    # One cycle through all letters: k steps never come back to the start for k < NUM_LETTERS.
    cycle = rng.sample(string.ascii_lowercase[:NUM_LETTERS], NUM_LETTERS)
    arrows = [a + b for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
    rng.shuffle(arrows)
    question = f"{' '.join(arrows)} {cycle[0]}{difficulty}="
    return Item("lookup", question, cycle[difficulty % NUM_LETTERS], difficulty)


def _expression(operations: int, rng: random.Random) -> tuple[str, int]:
    if operations == 0:
        digit = rng.randint(0, 9)
        return str(digit), digit
    left = rng.randint(0, operations - 1)
    (left_text, a), (right_text, b) = _expression(left, rng), _expression(operations - 1 - left, rng)
    symbol = rng.choice(list(OPERATORS))
    return f"({left_text}{symbol}{right_text})", OPERATORS[symbol](a, b) % 10
