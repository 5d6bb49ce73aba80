"""transformers' Trainer, with batches that have several supervised steps.

A batch of `batch_size` rows is the unit of data. The Trainer's loop runs over its supervised steps
(`rounds`): in each, every part of the batch (one a process and accumulation step) is taken on to
the drawn step, and the Trainer updates after every round, or after the last one.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from vllm_loopus.training.objective import Counts, Labelled, language_modelling_loss, token_losses
from vllm_loopus.training.packing import Document, collate
from vllm_loopus.training.schedule import CosineByTokens, cosine_by_tokens
from vllm_loopus.training.settings import Settings
from vllm_loopus.training.supervision import (
    Carried,
    draw_steps,
    measure_by_depth,
    supervised_step,
)

POSITION = "data_position.json"
NOT_DECAYED = ("A_log",)


class PackedTrainer(Trainer):
    """What looped and plain training share: data, counts, schedule, evaluation, log."""

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        self.settings = settings
        optimizer = settings.optimizer
        self.schedule = CosineByTokens(
            settings.tokens, optimizer.warmup_tokens, optimizer.final_learning_rate
        )
        super().__init__(**kwargs)
        # Losses are divided by counts of the whole batch.
        self.loss_is_scaled_for_ga = True
        self._rounds: list[list[dict[str, Any]]] = []
        self._batch_tokens = (0, 0)  # before the batch, and of it
        self._counts = Counts(0, 0)
        self._sums: dict[str, torch.Tensor] = {}
        self._steps_seen = self._labelled_seen = 0

    # Data

    @property
    def batches(self) -> int:
        """Batches done."""
        return self.state.global_step // self.settings.updates_per_batch

    def tokens(self) -> int:
        """Tokens of data seen."""
        return self.schedule.tokens

    @property
    def done(self) -> bool:
        """Whether the token budget is used, and the last batch over."""
        return not self._rounds and self.schedule.tokens >= self.settings.tokens

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Counts]:
        """The parts of the next round; reads the next batch when the last one is over."""
        if not self._rounds:
            parts = num_batches * self.settings.updates_per_batch // self.settings.rounds_per_batch
            self._read([next(epoch_iterator) for _ in range(parts)])
        before, tokens = self._batch_tokens
        done = self.settings.updates_per_batch - len(self._rounds) + 1
        self.schedule.tokens = before + tokens * done // self.settings.updates_per_batch
        steps = self.settings.rounds_per_batch // self.settings.updates_per_batch
        self._steps_seen += steps
        self._labelled_seen += steps * self._counts.tokens
        return self._rounds.pop(0), self._counts

    def _read(self, parts: list[dict[str, Any]]) -> None:
        for part in parts:
            lengths = part.pop("lengths")
            part["carried"] = Carried(Labelled.of(part.pop("labels"), part["position_ids"]))
            part["tokens"] = lengths.sum()
        counted = torch.stack(
            [
                torch.tensor([len(p["carried"].labelled) for p in parts]).sum(),
                torch.tensor([p["carried"].labelled.documents for p in parts]).sum(),
                sum(p.pop("tokens") for p in parts).cpu(),
            ]
        ).to(self.args.device)
        labelled, documents, tokens = self.accelerator.reduce(counted, "sum").tolist()
        self._counts = Counts(labelled, documents)
        self._batch_tokens = (self.schedule.tokens, tokens)
        self._rounds = self.rounds(parts)

    def rounds(self, parts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The parts of a batch as the Trainer goes through them, by update."""
        return [parts]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            position = self.train_dataset.position((self.batches - self._first) * self.rows)
            (Path(output_dir) / POSITION).write_text(json.dumps(position))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers. Raises `OSError` naming the folder; torch says `RuntimeError` for a
        full disk."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            raise OSError(
                f"{folder} could not be written: {error}; --resume goes on from the one before it"
            ) from error

    @property
    def rows(self) -> int:
        return self.settings.batch_size

    _first = 0  # batches done before this process began

    def restore_position(self, checkpoint: Path) -> None:
        """Read on from where a checkpoint stands."""
        self.train_dataset.restore(json.loads((checkpoint / POSITION).read_text()))
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        self._first = state["global_step"] // self.settings.updates_per_batch

    # Optimisation

    lr_scheduler: Any
    control: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = cosine_by_tokens(optimizer or self.optimizer, self.schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(NOT_DECAYED)]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the usual estimate knows nothing of loops."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        result = self.part_loss(model, inputs, num_items_in_batch)
        loss = result.pop("loss")
        for name, value in result.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        # Gradients are averaged over processes, and every part has its share of the whole already.
        loss = loss * self.accelerator.num_processes
        return (loss, result) if return_outputs else loss

    def part_loss(
        self, model: nn.Module, inputs: dict[str, Any], counts: Counts
    ) -> dict[str, torch.Tensor]:
        """`loss` of a part, and what to log: terms, and `right` tokens."""
        carried = inputs["carried"]
        labelled = carried.labelled
        logits = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        ).logits.flatten(0, 1)[labelled.where]
        losses = token_losses(logits, labelled.targets)
        right = (logits.detach().argmax(-1) == labelled.targets).sum()
        return {"loss": language_modelling_loss(losses, counts), "right": right}

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self._sums:
                logs.update(self._averages())
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"loss={logs['loss']} after {self.schedule.tokens:,} tokens: lower "
                    "optimizer.learning_rate, or check the data"
                )
        logs["tokens"] = self.schedule.tokens
        logs["batches"] = self.batches
        self.state.epoch = None  # there are none: the data is a stream
        super().log(logs, start_time)

    def _averages(self) -> dict[str, float]:
        """Terms of the loss and the share of right tokens since the last call."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        told = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        accuracy = told.pop("right") / max(self._labelled_seen, 1)
        averages = {name: value / self._steps_seen for name, value in told.items()}
        self._sums, self._steps_seen, self._labelled_seen = {}, 0, 0
        return {**averages, "accuracy": accuracy}

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and share of right tokens over the labelled tokens of the evaluation set."""
        model = self.model_wrapped if self.is_in_train else self.accelerator.prepare(self.model)
        model.eval()
        sums: dict[str, torch.Tensor] = {}
        total = torch.zeros((), device=self.args.device)
        for part in self._evaluation_parts(eval_dataset or self.eval_dataset):
            labelled = Labelled.of(part["labels"], part["position_ids"])
            total += len(labelled)
            with torch.no_grad():
                measured = self.measure(model, part["input_ids"], part["position_ids"], labelled)
            for name, value in measured.items():
                sums[name] = sums.get(name, 0) + value.double()
        total = self.accelerator.reduce(total, "sum").item()
        metrics: dict[str, float] = {}
        for name, value in sums.items():
            average = self.accelerator.reduce(value, "sum") / max(total, 1)
            metrics.update(self.named(name, average.tolist(), metric_key_prefix))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _evaluation_parts(self, rows: list[list[Document]]) -> Iterator[dict[str, torch.Tensor]]:
        """This process's parts of the evaluation set; every process has as many."""
        size, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        own = rows[self.accelerator.process_index :: processes]
        for start in range(0, -(-len(rows) // processes), size):
            part = collate(own[start : start + size] or [[]], *self.shape)
            yield {name: tensor.to(self.args.device) for name, tensor in part.items()}

    @property
    def shape(self) -> tuple[int, int]:
        """Length of a row, and the token that fills it."""
        return self.settings.data.max_length, self.processing_class.pad_token_id or 0

    def measure(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labelled: Labelled,
    ) -> dict[str, torch.Tensor]:
        """Sums over the labelled tokens of a part."""
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        logits = logits.flatten(0, 1)[labelled.where]
        right = logits.argmax(-1) == labelled.targets
        return {"loss": token_losses(logits, labelled.targets).sum(), "accuracy": right.sum()}

    @staticmethod
    def named(name: str, value: Any, prefix: str) -> dict[str, float]:
        """An average, or one a depth, as metrics."""
        if isinstance(value, list):
            return {f"{prefix}_{name}_depth_{r}": v for r, v in enumerate(value, start=1)}
        return {f"{prefix}_{name}": value}


class LoopedTrainer(PackedTrainer):
    """Trains a `TrainableLoopUS` by random deep supervision."""

    def rounds(self, parts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        supervision = self.settings.supervision
        steps = draw_steps(self.settings.seed, self.batches, supervision)
        if supervision.update == "batch":
            return [[{**part, "step": step} for part in parts for step in steps]]
        return [[{**part, "step": step} for part in parts] for step in steps]

    def part_loss(
        self, model: nn.Module, inputs: dict[str, Any], counts: Counts
    ) -> dict[str, torch.Tensor]:
        result = model(
            supervised_step,
            inputs["input_ids"],
            inputs["position_ids"],
            inputs["carried"],
            inputs["step"],
            self.settings.supervision,
            counts,
        )
        # The mean of the drawn steps, where they are updated together.
        result["loss"] = (
            result["loss"] * self.settings.updates_per_batch / self.settings.rounds_per_batch
        )
        return result

    def measure(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labelled: Labelled,
    ) -> dict[str, torch.Tensor]:
        return model(measure_by_depth, input_ids, position_ids, labelled)


class Flow(TrainerCallback):
    """Ends the run when the token budget is used, and logs with every checkpoint.

    A run that goes on from a checkpoint then logs what an unbroken one does.
    """

    trainer: PackedTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.trainer.done:
            control.should_training_stop = control.should_log = True
            control.should_evaluate = bool(self.trainer.eval_dataset)
            control.should_save = False
        control.should_log = control.should_log or control.should_save
        return control
