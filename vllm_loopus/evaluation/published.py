"""The paper's rows, to be put beside ours."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class PublishedRow:
    """What the paper reports for one base model, by column title: perplexities, accuracies in %.

    `normalised`: accuracies are `acc_norm` where the task has it.
    """

    base: str
    before: dict[str, float]
    after: dict[str, float]
    normalised: bool = False


def published_rows() -> list[PublishedRow]:
    """All rows of the paper that we know."""
    rows: list[dict[str, Any]] = tomllib.loads(FILE.read_text())["rows"]
    return [PublishedRow(**row) for row in rows]


def published_row(base: str | None) -> PublishedRow:
    """The row of a base model, by the last part of its name (`Qwen/Qwen3-4B`, `/models/Qwen3-4B`).

    Raises `ValueError` naming the rows there are.
    """
    rows = published_rows()
    name = Path(base or "").name.lower()
    for row in rows:
        # TinyLlama's checkpoints carry size and training step in their names.
        if name == row.base.lower() or (row.base == "TinyLlama" and name.startswith("tinyllama")):
            return row
    known = ", ".join(row.base for row in rows)
    raise ValueError(
        f"--published: the paper has no row for the base {base or 'of this model'!r}; there are "
        f"{known}. Leave --published out"
    )
