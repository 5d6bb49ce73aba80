"""Output of a run in progress: `metrics.jsonl`, and a progress bar in tokens."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import TrainerCallback

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's `metrics.jsonl`, without a last line that is incomplete."""
    file = folder / METRICS
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsFile(TrainerCallback):
    """Appends each log of losses or of an evaluation as one line, in a single write.

    When a run is resumed from a checkpoint, later lines are removed first, because they will be
    written again.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / METRICS
        self._began = time.monotonic()
        self._before = (0.0, 0)  # when speed was last computed, and the tokens then

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        earlier = [
            line for line in read_metrics(self.file.parent) if line["step"] <= state.global_step
        ]
        if state.global_step == 0:
            earlier = []
        with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False) as stream:
            stream.writelines(json.dumps(line) + "\n" for line in earlier)
        os.chmod(stream.name, 0o644)
        os.replace(stream.name, self.file)
        last = earlier[-1] if earlier else {}
        self._began = time.monotonic() - last.get("seconds", 0)
        self._before = (last.get("seconds", 0), last.get("tokens", 0))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        values = logs or {}
        losses = "loss" in values or any(name.startswith("eval_") for name in values)
        if not state.is_world_process_zero or not losses:
            return
        seconds = round(time.monotonic() - self._began, 2)
        values = {**values, **self._speed(seconds, values)}
        line = json.dumps({"step": state.global_step, "seconds": seconds, **values})
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (line + "\n").encode())
        finally:
            os.close(descriptor)

    def _speed(self, seconds: float, values: dict[str, Any]) -> dict[str, float]:
        """Tokens per second since the last line; none over an evaluation."""
        (before, tokens), self._before = self._before, (seconds, values.get("tokens", 0))
        if "loss" not in values or seconds <= before or self._before[1] <= tokens:
            return {}
        return {"tokens_per_second": round((self._before[1] - tokens) / (seconds - before), 1)}


T = TypeVar("T")


def evaluation_progress(micro_batches: Sequence[T], shown: bool) -> Iterable[T]:
    """The micro-batches of an evaluation, with a bar that disappears where it is a terminal."""
    return tqdm(
        micro_batches, desc="evaluate", unit="batch", leave=not sys.stderr.isatty(),
        mininterval=_interval(), disable=not shown,
    )  # fmt: skip


def _interval() -> float:
    """Seconds between updates of a bar, or between lines of a log."""
    return 0.5 if sys.stderr.isatty() else 30


class Progress(TrainerCallback):
    """A progress bar of the tokens seen, in the main process."""

    def __init__(self, budget: int, tokens: Any) -> None:
        self.budget, self.tokens = budget, tokens  # `tokens()`: the tokens seen so far
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            done = self.tokens()  # of a resumed run; speed and time left are those of this process
            self._bar = tqdm(
                total=self.budget, initial=done, unit="tok", unit_scale=True, desc="train",
                mininterval=_interval(),
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(min(self.tokens(), self.budget) - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        shown = {
            name.removeprefix("eval_"): f"{value:.3f}"
            for name, value in (logs or {}).items()
            if name in ("loss", "accuracy", "eval_exit_accuracy", "eval_accuracy")
        }
        if self._bar is not None and shown:
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
