"""Runs a training from its settings to the final model."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.integrations import is_tensorboard_available, is_wandb_available
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from vllm_loopus.architectures import architecture_of
from vllm_loopus.architectures.recursive.config import RecursiveConfig
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.checkpoint import TOKENIZER_FILES
from vllm_loopus.recast.base import find_checkpoint
from vllm_loopus.training import xformers_attention
from vllm_loopus.training.checkpoints import MODEL, FinalModel, last_complete
from vllm_loopus.training.documents import Documents
from vllm_loopus.training.metrics import MetricsFile, Progress, read_metrics
from vllm_loopus.training.packing import collate
from vllm_loopus.training.recursion import (
    RecursiveTrainer,
    TrainableRecursive,
    check_recursive,
)
from vllm_loopus.training.settings import Settings, SettingsError, settings_from
from vllm_loopus.training.stream import PackedStream, evaluation_sequences
from vllm_loopus.training.supervision import TrainableLoopUS
from vllm_loopus.training.thresholds import suggestion
from vllm_loopus.training.trainer import Flow, LoopedTrainer, PackedTrainer

CONFIG = "config.yaml"
MAX_STEPS = 2**40  # never reached: the token budget ends a run
TRAINERS: dict[str, type[PackedTrainer]] = {
    "looped": LoopedTrainer,
    "recursive": RecursiveTrainer,
    "plain": PackedTrainer,
}
# Settings that may differ in a resumed run, because they do not affect the results.
FREE_TO_CHANGE = ("output", "micro_batch_size", "keep_checkpoints", "report_to")


class InterruptedRunError(Exception):
    """Training was interrupted with Ctrl-C; the message says what is there and how to go on."""

    def __init__(self, output: Path, checkpoint: Path | None) -> None:
        if checkpoint is None:
            super().__init__(
                f"interrupted before the first checkpoint; remove {output} and start again (with "
                "save_every, in batches, there are checkpoints to resume from)"
            )
        else:
            super().__init__(
                f"interrupted; the last complete checkpoint is {checkpoint}. Continue from it: the "
                "same command with --resume"
            )


@dataclass(frozen=True)
class Summary:
    """The summary of a finished run."""

    model: str
    tokens: int
    batches: int
    updates: int
    seconds: float
    metrics: dict[str, float]
    suggestion: str | None = None


def train(settings: Settings, resume: bool = False) -> Summary:
    """Runs a training to its end and writes the final model to the folder `model` of the output.

    With `resume`, the run in the output folder continues from its last complete checkpoint. Raises
    `ValueError` for invalid settings, models or data before training starts.
    """
    processes, rank = (int(os.environ.get(name, default)) for name, default in _PROCESSES)
    arguments = _arguments(settings, processes)
    if arguments.n_gpu > 1:
        raise SettingsError(
            f"{arguments.n_gpu} GPUs are visible to one process; start with accelerate launch, or "
            "set CUDA_VISIBLE_DEVICES to one"
        )
    if settings.attention == "flex_attention" and arguments.use_cpu:
        raise SettingsError("attention: flex_attention does not train on a CPU; use sdpa")
    checkpoint = _checkpoint(settings, resume, processes, rank)
    start = find_checkpoint(settings.model)
    transformers.set_seed(settings.seed)
    model = _load_model(settings, start)
    tokenizer = _load_tokenizer(settings, start, model.config)
    documents = Documents(tokenizer, settings.data.max_length)
    stream = PackedStream(settings.data, documents, settings.seed)
    evaluation = evaluation_sequences(settings.data, documents) if settings.data.eval else None
    if checkpoint is None and rank == 0:
        _create_output(settings)

    trainer_class = TRAINERS[settings.objective]
    pad = tokenizer.pad_token_id or 0
    trainer = trainer_class(
        settings,
        model=model,
        args=arguments,
        train_dataset=stream,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        data_collator=partial(collate, max_length=settings.data.max_length, pad=pad),
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    flow = Flow()
    flow.trainer = trainer
    for added in (flow, MetricsFile(settings.output), Progress(settings.tokens, trainer.tokens)):
        trainer.add_callback(added)
    if checkpoint is not None:
        trainer.restore_position(checkpoint)
    elif evaluation is not None and settings.eval_every:
        arguments.eval_on_start = True
    began = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            settings.output, last_complete(settings.output, processes)
        ) from error
    return _finish(settings, trainer, start, time.monotonic() - began)


_PROCESSES = (("WORLD_SIZE", "1"), ("RANK", "0"))


def _arguments(settings: Settings, processes: int) -> TrainingArguments:
    micro = settings.micro_batch_size or max(settings.batch_size // processes, 1)
    accumulation, left = divmod(settings.batch_size, micro * processes)
    if left or not accumulation:
        raise SettingsError(
            f"batch_size={settings.batch_size} must be a multiple of micro_batch_size={micro} "
            f"times {processes} processes; change one of them"
        )
    updates = settings.updates_per_batch
    optimizer = settings.optimizer
    has_evaluation = bool(settings.data.eval and settings.eval_every)
    return TrainingArguments(
        output_dir=str(settings.output),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation * settings.rounds_per_batch // updates,
        max_steps=MAX_STEPS,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=settings.mixed_precision == "bf16",
        fp16=settings.mixed_precision == "fp16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=settings.log_every * updates,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_evaluation else "no",
        eval_steps=max(settings.eval_every, 1) * updates,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=max(settings.save_every, 1) * updates,
        save_total_limit=settings.keep_checkpoints,
        seed=settings.seed,
        report_to=_report_to(settings),
        disable_tqdm=True,
        remove_unused_columns=False,
        ignore_data_skip=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=settings.objective == "looped"
        and settings.supervision.train_encoder,
    )


def _report_to(settings: Settings) -> list[str]:
    installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if settings.report_to == "none":
        return []
    if settings.report_to == "auto":
        return [name for name, available in installed.items() if available()]
    for name in settings.report_to:
        if not installed[name]():
            raise SettingsError(f"report_to: {name} is not installed; pip install {name}")
    return list(settings.report_to)


def _load_model(settings: Settings, start: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(start)
    except Exception as error:  # validators raise many types
        raise SettingsError(
            f"model={settings.model!r}: config.json is not valid: {error}"
        ) from error
    _check_objective(settings, config)
    looped = settings.objective != "plain"
    served = settings.served.model_dump(exclude_none=True)
    model_class: Any = AutoModelForCausalLM
    if settings.objective == "looped":
        model_class = TrainableLoopUS
        config.confidence_input = settings.supervision.confidence_input
        for name, value in served.items():
            setattr(config, name, value)
        config.check()
    elif settings.objective == "recursive":
        model_class = TrainableRecursive
        check_recursive(config, served)
    if settings.attention == xformers_attention.NAME:
        xformers_attention.register(config)
    options = {
        "dtype": getattr(torch, settings.weights_dtype),
        "attn_implementation": settings.attention,
    }
    if settings.random_weights:
        make: Callable[..., Any] = model_class._from_config if looped else model_class.from_config
        model = make(config, **options)
    else:
        model = model_class.from_pretrained(start, config=config, **options)
    if settings.objective == "looped" and not settings.supervision.train_encoder:
        model.encoder.requires_grad_(False)
    elif settings.objective == "recursive":
        model.train_only(settings.recursion)
    return model


def _check_objective(settings: Settings, config: Any) -> None:
    """Raises `SettingsError` if the objective is not one for the model."""
    name, objective = f"model={settings.model!r}", settings.objective
    if isinstance(config, RecursiveConfig):
        if objective != "recursive":
            raise SettingsError(f"{name} is a recursive transformer; set objective: recursive")
        return
    looped = isinstance(config, LoopUSConfig)
    if not looped and architecture_of(config) is not None:
        raise SettingsError(f"{name} is a {config.model_type} model, which cannot be trained here")
    if objective == "recursive":
        kind = "LoopUS" if looped else f"plain {config.model_type}"
        raise SettingsError(
            f"{name} is a {kind} model, but objective: recursive trains recursive transformers; "
            "make one (vllm-loopus recast BASE --method recursive --loops B --lora-rank R --out "
            f"FOLDER), or set objective: {'looped' if looped else 'plain'}"
        )
    if objective == "looped" and not looped:
        raise SettingsError(
            f"{name} is a plain {config.model_type} model; cut it first "
            f"(vllm-loopus recast {settings.model} --out FOLDER), or set objective: plain"
        )
    if objective == "plain" and looped:
        raise SettingsError(
            f"{name} is a LoopUS model, but objective: plain trains plain models; set objective: "
            "looped"
        )


def _load_tokenizer(settings: Settings, start: Path, config: Any) -> Any:
    own = any((start / name).is_file() for name in TOKENIZER_FILES)
    source = start if own else getattr(config, "base_model_name_or_path", None)
    if source is None:
        raise SettingsError(f"model={settings.model!r} has no tokenizer; add one to its folder")
    return AutoTokenizer.from_pretrained(source)


def _checkpoint(settings: Settings, resume: bool, processes: int, rank: int) -> Path | None:
    """The checkpoint to resume from; None to start from the beginning.

    Raises `SettingsError` if the output folder is not empty and cannot be resumed.
    """
    out, file = settings.output, settings.output / CONFIG
    if resume and file.is_file():
        _check_same(settings, settings_from(yaml.safe_load(file.read_text())))
        if (out / MODEL).exists():
            raise SettingsError(
                f"output={str(out)!r}: this run is finished, its model is {out / MODEL}; choose "
                "another output to train again"
            )
        return last_complete(out, processes)
    if rank == 0 and out.exists() and (not out.is_dir() or any(out.iterdir())):
        hint = "" if resume else "give --resume to continue it, or "
        raise SettingsError(f"output={str(out)!r} exists; {hint}choose another folder")
    return None


def _create_output(settings: Settings) -> None:
    shown = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
        (settings.output / CONFIG).write_text(shown)
    except OSError as error:
        raise SettingsError(
            f"output={str(settings.output)!r} cannot be written: {error.strerror}"
        ) from error


def _check_same(now: Settings, before: Settings) -> None:
    ours, theirs = now.model_dump(mode="json"), before.model_dump(mode="json")
    different = [name for name in ours if ours[name] != theirs[name] and name not in FREE_TO_CHANGE]
    if different:
        changes = "; ".join(f"{name} was {theirs[name]}, is {ours[name]}" for name in different)
        raise SettingsError(
            f"--resume needs the settings of {now.output / CONFIG}; restore them: {changes}"
        )


def _finish(settings: Settings, trainer: PackedTrainer, start: Path, seconds: float) -> Summary:
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    metrics: dict[str, float] = {}
    if trainer.is_world_process_zero():
        lines = read_metrics(settings.output)
        last: dict[str, Any] = next(filter(_is_evaluation, reversed(lines)), {})
        metrics = {name: value for name, value in last.items() if name.startswith("eval_")}
        final = FinalModel(
            settings, trainer.processing_class, start, trainer.schedule.tokens, metrics
        )
        final.write(trainer.accelerator.unwrap_model(trainer.model), state_dict)
    trainer.accelerator.wait_for_everyone()
    return Summary(
        model=str(settings.output / MODEL),
        tokens=trainer.schedule.tokens,
        batches=trainer.batches,
        updates=trainer.state.global_step,
        seconds=round(seconds, 1),
        metrics=metrics,
        suggestion=suggestion(metrics, getattr(trainer.model.config, "max_loops", 0)),
    )


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in line)
