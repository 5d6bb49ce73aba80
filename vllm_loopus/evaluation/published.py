"""The results in the paper, for comparison with ours."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class PublishedRow:
    """The paper's results for one base model by column title: perplexities, and accuracies in %.

    `normalised`: whether accuracies are `acc_norm` for tasks that have it.
    """

    base: str
    before: dict[str, float]
    after: dict[str, float]
    normalised: bool = False


def published_rows() -> list[PublishedRow]:
    """All stored rows of the paper."""
    rows: list[dict[str, Any]] = tomllib.loads(FILE.read_text())["rows"]
    return [PublishedRow(**row) for row in rows]


def published_row(base: str | None) -> PublishedRow:
    """The row of a base model, by the last part of its name (`Qwen/Qwen3-4B`, `/models/Qwen3-4B`).

    Raises `ValueError` that names the available rows if there is none.
    """
    rows = published_rows()
    name = Path(base or "").name.lower()
    for row in rows:
        # The names of TinyLlama checkpoints contain size and training step.
        if name == row.base.lower() or (row.base == "TinyLlama" and name.startswith("tinyllama")):
            return row
    known = ", ".join(row.base for row in rows)
    raise ValueError(
        f"--published: the paper has no row for the base {base or 'of this model'!r}, only for "
        f"{known}; leave --published out"
    )
