"""Stores results on disk, one file for each model, setting and task, written atomically.

A result is identified by everything that affects its values, its *identity*. With another
threshold, limit, dtype or checkpoint it is another file.
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

FORMAT = 1  # version of the file format


@dataclass(frozen=True)
class Result:
    """The result of one task.

    - `identity`: see above. `model`, `setting`: names for display.
    - `metrics`: by task (for a group: of the group and its tasks), as lm-eval returns them.
    - `items`: by task, for each document its responses, metrics and difficulty (if it has one).
    - `seconds`: wall-clock time without loading model and data.
    - `about`: date and machine.
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
    """A folder of results, which several runs can share."""

    folder: Path

    def check(self) -> None:
        """Raises `ValueError` if the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(f"out={self.folder} cannot be written: {error.strerror}") from error

    def file(self, model: str, task: str, identity: dict[str, Any]) -> Path:
        """The file of the result with this identity."""
        text = json.dumps(identity, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / _file_name(Path(model).name) / f"{_file_name(task)}-{digest}.json"

    def load(self, model: str, task: str, identity: dict[str, Any]) -> Result | None:
        """The stored result; None if there is none or its file is damaged."""
        try:
            content = json.loads(self.file(model, task, identity).read_text())
            if content.pop("format") != FORMAT or content["identity"] != identity:
                return None
            return Result(**{**content, "work": Work(**content["work"])})
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def save(self, result: Result) -> Path:
        """Writes a result atomically. Raises `OSError` that names the file."""
        file = self.file(result.model, result.task, result.identity)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, **asdict(result)}
        write_text(file, json.dumps(content, indent=1))
        return file


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)
