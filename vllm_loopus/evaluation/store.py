"""Results on disk: a file for each (model, setting, task), written whole or not at all.

A result is found again by its *identity*: everything that decides its numbers. Another threshold,
limit, dtype or checkpoint is another file.
"""

import hashlib
import json
import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_loopus.evaluation.work import Work
from vllm_loopus.files import write_text

FORMAT = 1  # of the file


@dataclass(frozen=True)
class Result:
    """What one task gave.

    - `identity`: see above; `model`, `setting`: for people.
    - `metrics`: by task (of a group too, and of the group itself), as lm-eval gives them.
    - `items`: by task, one entry a document: responses, metrics, difficulty where it has one.
    - `seconds`: of wall clock, loading of model and data not included.
    - `about`: date, machine, versions.
    """

    identity: dict[str, Any]
    task: str
    model: str
    setting: str
    metrics: dict[str, dict[str, Any]]
    items: dict[str, list[dict[str, Any]]]
    seconds: float
    work: Work = field(default_factory=Work)
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Store:
    """A folder of results. Several runs may share it."""

    folder: Path

    def check(self) -> None:
        """Raises `ValueError` when nothing can be written there."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(f"out={self.folder} cannot be written: {error.strerror}") from error

    def file(self, model: str, task: str, identity: dict[str, Any]) -> Path:
        """Where the result of this identity is, or would be."""
        text = json.dumps(identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / _file_name(Path(model).name) / f"{_file_name(task)}-{digest}.json"

    def load(self, model: str, task: str, identity: dict[str, Any]) -> Result | None:
        """None when there is none, or when the file is damaged."""
        try:
            content = json.loads(self.file(model, task, identity).read_text())
            if content.pop("format") != FORMAT or content["identity"] != identity:
                return None
            return Result(**{**content, "work": Work(**content["work"])})
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def save(self, result: Result) -> Path:
        """Complete or not at all. Raises `OSError` naming the file."""
        file = self.file(result.model, result.task, result.identity)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, **asdict(result)}
        write_text(file, json.dumps(content, indent=1))
        return file


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)
