"""transformers' Trainer for batches with several supervised steps.

A batch has `batch_size` packed sequences, divided into micro-batches by process and accumulation
step. It is processed in `rounds`, one for each supervised step, or a single one if it has only one
update. In a round, every micro-batch is run up to its supervised step; then the Trainer updates.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from vllm_loopus.training.metrics import evaluation_progress
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
from vllm_loopus.training.thresholds import DEPTH, LOSS, THRESHOLDS
from vllm_loopus.training.vocabulary import plain_scores

POSITION = "data_position.json"
NOT_DECAYED = ("A_log",)


class PackedTrainer(Trainer):
    """The common base of looped and plain training: data, counts, schedule, evaluation, logs."""

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
        self._batch_tokens = (0, 0)  # tokens before the batch, and in it
        self._counts = Counts(0, 0)
        self._sums: dict[str, torch.Tensor] = {}
        self._steps_seen = self._labelled_seen = 0

    # Data

    @property
    def batches(self) -> int:
        """The number of batches done."""
        return self.state.global_step // self.settings.updates_per_batch

    def tokens(self) -> int:
        """The number of tokens seen."""
        return self.schedule.tokens

    @property
    def done(self) -> bool:
        """Whether the token budget is used up and the last batch is done."""
        return not self._rounds and self.schedule.tokens >= self.settings.tokens

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Counts]:
        """The micro-batches of the next round. Reads the next batch after the last round."""
        if not self._rounds:
            settings = self.settings
            count = num_batches * settings.updates_per_batch // settings.rounds_per_batch
            self._read([next(epoch_iterator) for _ in range(count)])
        before, tokens = self._batch_tokens
        done = self.settings.updates_per_batch - len(self._rounds) + 1
        self.schedule.tokens = before + tokens * done // self.settings.updates_per_batch
        steps = self.settings.rounds_per_batch // self.settings.updates_per_batch
        self._steps_seen += steps
        self._labelled_seen += steps * self._counts.tokens
        return self._rounds.pop(0), self._counts

    def _read(self, micro_batches: list[dict[str, Any]]) -> None:
        for micro_batch in micro_batches:
            lengths = micro_batch.pop("lengths")
            labelled = Labelled.of(micro_batch.pop("labels"), micro_batch["position_ids"])
            micro_batch["carried"] = Carried(labelled)
            micro_batch["tokens"] = lengths.sum()
        counted = torch.stack(
            [
                torch.tensor([len(m["carried"].labelled) for m in micro_batches]).sum(),
                torch.tensor([m["carried"].labelled.documents for m in micro_batches]).sum(),
                sum(m.pop("tokens") for m in micro_batches).cpu(),
            ]
        ).to(self.args.device)
        targets, documents, tokens = self.accelerator.reduce(counted, "sum").tolist()
        self._counts = Counts(targets, documents)
        self._batch_tokens = (self.schedule.tokens, tokens)
        self._rounds = self.rounds(micro_batches)

    def rounds(self, micro_batches: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The micro-batches of each round of a batch."""
        return [micro_batches]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            sequences = (self.batches - self._first) * self.settings.batch_size
            position = self.train_dataset.position(sequences)
            (Path(output_dir) / POSITION).write_text(json.dumps(position))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers. Raises `OSError` that names the folder, also if the disk is full,
        for which torch raises `RuntimeError`."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            raise OSError(
                f"{folder} could not be written: {error}; free some space and continue from the "
                "checkpoint before it with --resume"
            ) from error

    _first = 0  # batches done before this process started

    def restore_position(self, checkpoint: Path) -> None:
        """Continues to read data from the position stored in a checkpoint."""
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
        """Not estimated, because transformers' estimate ignores loops."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        result = self.micro_batch_loss(model, inputs, num_items_in_batch)
        loss = result.pop("loss")
        for name, value in result.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
        # The Trainer averages gradients over processes, but the loss is already a share of the
        # batch's loss.
        loss = loss * self.accelerator.num_processes
        return (loss, result) if return_outputs else loss

    def micro_batch_loss(
        self, model: nn.Module, inputs: dict[str, Any], counts: Counts
    ) -> dict[str, torch.Tensor]:
        """The `loss` of a micro-batch and the values to log: its terms, and `right` tokens."""
        carried = inputs["carried"]
        labelled = carried.labelled
        losses, right = self._scores(model, inputs["input_ids"], inputs["position_ids"], labelled)
        return {"loss": language_modelling_loss(losses, counts), "right": right.sum()}

    def _scores(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labelled: Labelled,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token losses and right tokens [n] of a plain model."""
        with plain_scores(self.accelerator.unwrap_model(model), labelled) as scores:
            logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        if scores is not None:
            return scores.losses, scores.right
        logits = logits.flatten(0, 1)[labelled.where]
        return token_losses(logits, labelled.targets), logits.argmax(-1) == labelled.targets

    # Log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self._sums:
                logs.update(self._averages())
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"loss={logs['loss']} after {self.schedule.tokens:,} tokens; lower "
                    "optimizer.learning_rate, or check the data"
                )
        logs["tokens"] = self.schedule.tokens
        logs["batches"] = self.batches
        self.state.epoch = None  # a stream has no epochs
        super().log(logs, start_time)

    def _averages(self) -> dict[str, float]:
        """Mean terms of the loss and the share of right tokens since the last call."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        totals = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
        accuracy = totals.pop("right") / max(self._labelled_seen, 1)
        averages = {name: value / self._steps_seen for name, value in totals.items()}
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
        for micro_batch in self._evaluation_micro_batches(eval_dataset or self.eval_dataset):
            labelled = Labelled.of(micro_batch["labels"], micro_batch["position_ids"])
            total += len(labelled)
            with torch.no_grad():
                measured = self.measure(
                    model, micro_batch["input_ids"], micro_batch["position_ids"], labelled
                )
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

    def _evaluation_micro_batches(
        self, sequences: list[list[Document]]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """This process's micro-batches of the evaluation set; all processes have equally many."""
        size, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        own = sequences[self.accelerator.process_index :: processes]
        starts = range(0, -(-len(sequences) // processes), size)
        for start in evaluation_progress(starts, self.is_world_process_zero()):
            micro_batch = collate(own[start : start + size] or [[]], *self.shape)
            yield {name: tensor.to(self.args.device) for name, tensor in micro_batch.items()}

    @property
    def shape(self) -> tuple[int, int]:
        """The length of a packed sequence, and its padding token."""
        return self.settings.data.max_length, self.processing_class.pad_token_id or 0

    def measure(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labelled: Labelled,
    ) -> dict[str, torch.Tensor]:
        """Sums over the labelled tokens of a micro-batch."""
        losses, right = self._scores(model, input_ids, position_ids, labelled)
        return {"loss": losses.sum(), "accuracy": right.sum()}

    @staticmethod
    def named(name: str, value: Any, prefix: str) -> dict[str, float]:
        """A metric for an average, or one for each depth (or threshold) if it is a list."""
        if name in (DEPTH, LOSS):
            return {f"{prefix}_{name}_{t}": v for t, v in zip(THRESHOLDS, value, strict=True)}
        if isinstance(value, list):
            return {f"{prefix}_{name}_depth_{r}": v for r, v in enumerate(value, start=1)}
        return {f"{prefix}_{name}": value}


class LoopedTrainer(PackedTrainer):
    """Trains a `TrainableLoopUS` by random deep supervision."""

    def rounds(self, micro_batches: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        supervision = self.settings.supervision
        steps = draw_steps(self.settings.seed, self.batches, supervision)
        if supervision.update == "batch":
            return [
                [{**micro_batch, "step": step} for micro_batch in micro_batches for step in steps]
            ]
        return [[{**micro_batch, "step": step} for micro_batch in micro_batches] for step in steps]

    def micro_batch_loss(
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
        # The mean over the drawn steps if they share an update.
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
    """Ends the run when the token budget is used up, and logs with every checkpoint.

    Thus a resumed run logs the same values as an uninterrupted one.
    """

    trainer: PackedTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.trainer.done:
            control.should_training_stop = control.should_log = True
            control.should_evaluate = bool(self.trainer.eval_dataset)
            control.should_save = False
        control.should_log = control.should_log or control.should_save
        return control
