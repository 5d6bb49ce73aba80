"""What a run tells while it runs: `metrics.jsonl`, and a progress bar by tokens."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line cut off by a kill is left out."""
    file = folder / METRICS
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsFile(TrainerCallback):
    """Appends every log of losses or an evaluation as one line, in one write.

    When a run goes on from a checkpoint, lines after it are dropped first: they come again.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / METRICS
        self._began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = [
            line for line in read_metrics(self.file.parent) if line["step"] <= state.global_step
        ]
        if state.global_step == 0:
            kept = []
        with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False) as stream:
            stream.writelines(json.dumps(line) + "\n" for line in kept)
        os.chmod(stream.name, 0o644)
        os.replace(stream.name, self.file)
        self._began = time.monotonic() - (kept[-1]["seconds"] if kept else 0)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        told = logs or {}
        losses = "loss" in told or any(name.startswith("eval_") for name in told)
        if not state.is_world_process_zero or not losses:
            return
        seconds = round(time.monotonic() - self._began, 2)
        line = json.dumps({"step": state.global_step, "seconds": seconds, **told})
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (line + "\n").encode())
        finally:
            os.close(descriptor)


class Progress(TrainerCallback):
    """A bar of the tokens seen, on the main process."""

    def __init__(self, budget: int, tokens: Any) -> None:
        self.budget, self.tokens = budget, tokens  # `tokens()`: seen so far
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            seconds = 0.5 if sys.stderr.isatty() else 30  # between lines of a log
            self._bar = tqdm(
                total=self.budget, unit="tok", unit_scale=True, desc="train", mininterval=seconds
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(min(self.tokens(), self.budget) - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        told = {
            name.removeprefix("eval_"): f"{value:.3f}"
            for name, value in (logs or {}).items()
            if name in ("loss", "accuracy", "eval_exit_accuracy", "eval_accuracy")
        }
        if self._bar is not None and told:
            self._bar.set_postfix(told, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
