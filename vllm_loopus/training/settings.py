"""The settings of a training run: the YAML file of `vllm-loopus train`, and its checks."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vllm_loopus.config import CONFIDENCE_INPUTS, HALTING_STRATEGIES

Positive = Annotated[int, Field(ge=1)]


def _whole_number(value: Any) -> Any:
    """Accepts `1.5e9` and `1_000`, which YAML reads as strings."""
    try:
        return int(float(value.replace("_", ""))) if isinstance(value, str) else value
    except (ValueError, OverflowError):
        return value


Tokens = Annotated[int, BeforeValidator(_whole_number)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_only_where_it_belongs(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if not isinstance(value, bool) or kind is bool:
            return value
        if not value and "no" in get_args(kind):
            return "no"  # YAML reads an unquoted `no` as false
        raise ValueError(f"{str(value).lower()} is a boolean; give a number or a string")


class Supervision(Section):
    """Random deep supervision.

    - `n_supervision` of `n_reasoning_steps` steps are drawn for each batch; only these have a loss.
    - `beta`: weight of `L_Mono`; `confidence_weight`: weight of `L_Q`.
    - `monotonicity`: compare losses per `document`, or per `batch` (as in the released code: over
      one micro-batch of one process).
    - `confidence_input`: what the head reads, the gated `state` or the `update`. It is stored in
      the checkpoint, so that the served model uses the same input.
    - `confidence_target`: the share of right tokens of the `sequence`, predicted at its last token
      (as in the released code), or whether the prediction is right, at every labelled `token`.
    - `confidence_gradient`: `body` (as in the released code: `L_Q` also trains the reasoning block)
      or `head`.
    - `supervised_passes`: passes in a supervised step, with gradients through all of them: 1
      (paper) or 2 (released code).
    - `update`: an optimiser update after every drawn `step`, or once per `batch`.
    - `train_encoder`: False (as in the released code) freezes the encoder. With True it is trained
      on batches whose first step is drawn, the only ones in which a loss depends on it.
    """

    n_supervision: Positive = 5
    n_reasoning_steps: Positive = 20
    beta: NotNegative = 1.0
    confidence_weight: NotNegative = 1.0
    monotonicity: Literal["document", "batch"] = "document"
    confidence_input: Literal[CONFIDENCE_INPUTS] = "state"  # type: ignore[valid-type]
    confidence_target: Literal["sequence", "token"] = "sequence"
    confidence_gradient: Literal["body", "head"] = "body"
    supervised_passes: Positive = 1
    update: Literal["step", "batch"] = "step"
    train_encoder: bool = False

    @model_validator(mode="after")
    def _drawn_from_enough(self) -> "Supervision":
        if self.n_supervision > self.n_reasoning_steps:
            raise ValueError(
                f"n_supervision={self.n_supervision} steps cannot be drawn from "
                f"n_reasoning_steps={self.n_reasoning_steps}; lower it or raise n_reasoning_steps"
            )
        return self


class Recursion(Section):
    """Training of a recursive transformer (`objective: recursive`).

    - `intermediate_weight`: weight of the loss at each depth below the last. 0: full depth only.
    - `train`: `all` weights, or the `lora` alone.
    """

    intermediate_weight: NotNegative = 0.1
    train: Literal["all", "lora"] = "all"


class Source(Section):
    """Training data: a local file `path` (JSONL or Parquet) or a `dataset` (name:config:split).

    A row has text in `text_field`, a chat in `messages`, or `prompt` and `completion`. `weight`:
    how often rows are drawn from this source, relative to the other sources.
    """

    path: Path | None = None
    dataset: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    text_field: str = "text"

    @model_validator(mode="after")
    def _one_of_them(self) -> "Source":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of path (a local file) and dataset (on the hub)")
        if self.path is not None and self.path.suffix not in (".jsonl", ".json", ".parquet"):
            raise ValueError(f"path={str(self.path)!r} must end in .jsonl, .json or .parquet")
        return self


class Data(Section):
    """Data, packed into sequences of `max_length` tokens. Documents do not attend to each other.

    - `shuffle_documents`: how many documents are read, shuffled and packed at a time.
    - `shuffle`: whether local files are shuffled. If not, they are read in order, repeatedly (a
      curriculum), and only the documents read at a time are shuffled.
    - `eval`: sources of the evaluation set; the first `eval_documents` documents are used.
    """

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    eval: tuple[Source, ...] = ()
    eval_documents: Positive = 1000
    max_length: Annotated[int, Field(ge=2)] = 1024
    shuffle: bool = True
    shuffle_documents: Positive = 4096


class Optimizer(Section):
    """AdamW, with a learning rate by tokens seen: linear warm-up, then a half cosine.

    `final_learning_rate`: the share of `learning_rate` at the end. `max_grad_norm`: 0 disables
    gradient clipping.
    """

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-5
    final_learning_rate: Share = 0.0
    warmup_tokens: Annotated[Tokens, Field(ge=0)] = 0
    weight_decay: NotNegative = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: NotNegative = 1.0


class Served(Section):
    """Config fields of the final checkpoint. Fields that are not given are those of `model`."""

    max_loops: Positive | None = None
    min_loops: Positive | None = None
    exit_threshold: NotNegative | None = None
    exit_interval: Positive | None = None
    halting_strategy: Literal[HALTING_STRATEGIES] | None = None  # type: ignore[valid-type]
    convergence_epsilon: NotNegative | None = None


class Settings(Section):
    """A run of `vllm-loopus train`.

    - `model`: the initial model, a folder, an alias or owner/name on the hub. With
      `random_weights`, only its config and tokenizer are used.
    - `objective`: `looped` (for a LoopUS checkpoint), `recursive` (for a recursive transformer),
      or `plain`, next-token prediction for any causal LM, as a control.
    - `tokens`: the number of tokens to train on. Each token of a batch counts once.
    - `batch_size`: packed sequences of a batch, over all processes; `micro_batch_size`: packed
      sequences that a process computes at a time.
    - `log_every`, `eval_every`, `save_every`: in batches; 0 for never.
    """

    model: str
    output: Annotated[Path, AfterValidator(Path.expanduser)]
    objective: Literal["looped", "recursive", "plain"] = "looped"
    random_weights: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    tokens: Annotated[Tokens, Field(ge=1)]
    batch_size: Positive
    micro_batch_size: Positive | None = None
    supervision: Supervision = Supervision()
    recursion: Recursion = Recursion()
    data: Data
    optimizer: Optimizer = Optimizer()
    served: Served = Served()
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention", "xformers"] = "sdpa"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    gradient_checkpointing: bool = False
    log_every: Positive = 10
    eval_every: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=0)] = 0
    keep_checkpoints: Positive = 2
    report_to: Literal["auto", "none"] | tuple[Literal["tensorboard", "wandb"], ...] = "auto"

    @model_validator(mode="after")
    def _batches_add_up(self) -> "Settings":
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide "
                f"batch_size={self.batch_size}; choose a divisor"
            )
        if self.optimizer.warmup_tokens >= self.tokens:
            raise ValueError(
                f"optimizer.warmup_tokens={self.optimizer.warmup_tokens} must be below "
                f"tokens={self.tokens}"
            )
        return self

    @property
    def updates_per_batch(self) -> int:
        """The number of optimiser updates per batch."""
        by_step = self.objective == "looped" and self.supervision.update == "step"
        return self.supervision.n_supervision if by_step else 1

    @property
    def rounds_per_batch(self) -> int:
        """The number of supervised steps per batch."""
        return self.supervision.n_supervision if self.objective == "looped" else 1


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys, of which YAML would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


class SettingsError(ValueError):
    """A setting is invalid; the message names key, value and fix."""


def read_settings(file: Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads the settings in a YAML file.

    `overrides`: `key=value`, with dots in keys and values in YAML. Paths in the file are relative
    to the working directory. Raises `SettingsError`.
    """
    try:
        content = yaml.load(file.read_text(), _UniqueKeys)  # a safe loader
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} has no keys; see configs/ for examples")
    for override in overrides:
        _override(content, override)
    return settings_from(content)


def settings_from(content: dict[str, Any]) -> Settings:
    """Settings from the content of a file. Raises `SettingsError` that names all wrong keys."""
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError("; ".join(_messages(error))) from error


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set {override!r} is not key=value, such as supervision.beta=0.5")
    *sections, name = key.split(".")
    place: Any = content
    for section in sections:
        place = place.setdefault(section, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise SettingsError(f"--set {override!r}: {'.'.join(sections)} has no keys in the file")
    try:
        place[name] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override!r}: the value is not YAML: {error}") from error


def _messages(error: ValidationError) -> Iterator[str]:
    for wrong in error.errors():
        where = wrong["loc"]
        if wrong["type"] == "too_short" and wrong["input"]:
            continue  # its items are wrong, which is reported separately
        key = ".".join(str(part) for part in where)
        if wrong["type"] == "extra_forbidden":
            known = _keys_beside(where)
            near = difflib.get_close_matches(str(where[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            yield f"{key}: unknown key; {hint}"
        elif wrong["type"] == "missing":
            yield f"{key} is missing"
        elif wrong["type"] == "value_error":
            yield (f"{key}: " if key else "") + str(wrong["ctx"]["error"])
        else:
            yield f"{key}={wrong['input']!r}: {wrong['msg']}"


def _keys_beside(where: tuple[int | str, ...]) -> list[str]:
    """The known keys of the section that a key is in."""
    section: type[BaseModel] = Settings
    for part in where[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            kinds = [section.model_fields[part].annotation]
            while kinds:
                kind = kinds.pop()
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    section = kind
                kinds += getattr(kind, "__args__", ())
    return list(section.model_fields)
