"""The models to evaluate, each with one or two settings."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from vllm_loopus.architectures import architecture_of, record_of
from vllm_loopus.modeling.checkpoint import TOKENIZER_FILES
from vllm_loopus.modeling.fixed_depth import NONE
from vllm_loopus.recast.base import find_checkpoint, is_snapshot

HASHED_WHOLE = 2**30  # bytes; of larger files only size and modification time are hashed
READ_AT_ONCE = 2**24


@dataclass(frozen=True)
class Setting:
    """The depth of a model.

    A plain model has `max_loops` None. A looped model runs up to `max_loops` loops, with early exit
    at `exit_threshold`, or at full depth if that is None.
    """

    max_loops: int | None = None
    exit_threshold: float | None = None
    kv_policy: str | None = None  # shown if it is not the default

    @property
    def is_fixed(self) -> bool:
        return self.exit_threshold is None

    @property
    def label(self) -> str:
        """The text in the `depth` column of the table."""
        if self.max_loops is None:
            return "no loop"
        if self.exit_threshold is None:
            return f"{self.max_loops} loop{'s' * (self.max_loops > 1)}"
        policy = f", {self.kv_policy}" if self.kv_policy else ""
        return f"≤ {self.max_loops} loops, exit at {self.exit_threshold:g}{policy}"

    def knobs(self) -> dict[str, Any]:
        """Request knobs: `extra_args` in vLLM, config fields in transformers."""
        # With every halting strategy, no token exits before `min_loops`.
        if not self.max_loops or not self.is_fixed:
            return {}
        return {"min_loops": self.max_loops, "max_loops": self.max_loops}


@dataclass(frozen=True)
class Model:
    """A checkpoint folder and the settings to evaluate."""

    name: str
    folder: Path
    config: PreTrainedConfig
    settings: tuple[Setting, ...]

    @property
    def is_looped(self) -> bool:
        return architecture_of(self.config) is not None

    @property
    def tokenizer(self) -> str:
        """The folder with the tokenizer, of the model or its base model.

        Raises `ValueError` if there is none.
        """
        if any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            return str(self.folder)
        base = getattr(self.config, "base_model_name_or_path", None)
        if not base:
            raise ValueError(
                f"{self.name} has no tokenizer files and no base_model_name_or_path; add the "
                "tokenizer files to its folder"
            )
        return str(find_checkpoint(base))

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a sequence."""
        return int(self.config.get_text_config().max_position_embeddings)

    def overrides(self) -> dict[str, Any]:
        """Config fields of a looped model for its engine (vLLM's `hf_overrides`)."""
        record = architecture_of(self.config)
        if record is None:
            return {}
        return {name: getattr(self.config, name) for name in record.served_fields}

    def decides(self, setting: Setting) -> dict[str, Any]:
        """The part of `overrides` that affects the results of a setting."""
        return {"max_loops": setting.max_loops} if setting.is_fixed else self.overrides()

    def fingerprint(self) -> str:
        """A hash of all files that affect answers. Copies of a model have the same fingerprint."""
        digest = hashlib.sha256()
        files = sorted(
            file
            for pattern in ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "*.bin")
            for file in self.folder.glob(pattern)
        )
        for file in [*files, *sorted(self.folder.glob("*.pt"))]:
            size, changed = file.stat().st_size, file.stat().st_mtime_ns
            digest.update(f"{file.name}\0{size}\0".encode())
            if size <= HASHED_WHOLE:
                with file.open("rb") as content:
                    while part := content.read(READ_AT_ONCE):
                        digest.update(part)
            elif is_snapshot(self.folder):
                digest.update(self.folder.name.encode())
            else:
                digest.update(str(changed).encode())
        return digest.hexdigest()


def looped_model(
    name: str,
    max_loops: int | None,
    early_exit: bool | None,
    exit_threshold: float | None,
    by_depth: bool = False,
    kv_policy: str | None = None,
) -> Model:
    """The looped model at fixed depth, with early exit, or with both (`early_exit` None).

    `by_depth`: at every fixed depth instead of the last one. `kv_policy`: shown with early exit.
    Raises `ValueError` if it has no loop, and for invalid values.
    """
    folder, config = _read(name)
    try:
        record = record_of(config)
    except ValueError as error:
        raise ValueError(
            f"{name} is {error}; give the looped model first and the plain one as --base"
        ) from error
    if early_exit is False and exit_threshold is not None:
        raise ValueError(
            f"exit_threshold={exit_threshold} has no effect with --no-early-exit; remove one"
        )
    if max_loops is not None:
        config.max_loops = max_loops
        config.min_loops = min(config.min_loops, max(max_loops, 1))
    if exit_threshold is not None:
        config.exit_threshold = exit_threshold
    config.check()
    if config.halting_strategy == NONE:
        given = "--early-exit" if early_exit else f"exit_threshold={exit_threshold}"
        if early_exit or exit_threshold is not None:
            raise ValueError(
                f"{given} has no effect for {name}, whose halting_strategy is {NONE}: all tokens "
                "run to max_loops; leave it out"
            )
        return Model(name, folder, config, (Setting(config.max_loops),))
    limit = record.exit_rule.from_config(config).limit_name
    if limit != "exit_threshold" and exit_threshold is not None:
        raise ValueError(
            f"exit_threshold={exit_threshold} has no effect for {name}, whose halting_strategy is "
            f"{config.halting_strategy}; leave it out"
        )
    threshold = getattr(config, limit)
    first = 1 if by_depth else config.max_loops
    settings = []
    if early_exit is not True:
        settings += [Setting(depth) for depth in range(first, config.max_loops + 1)]
    if early_exit is not False:
        settings.append(Setting(config.max_loops, float(threshold), kv_policy))
    return Model(name, folder, config, tuple(settings))


def plain_model(name: str) -> Model:
    """A base model. Raises `ValueError` if it is a looped model or not a model."""
    folder, config = _read(name)
    if (record := architecture_of(config)) is not None:
        raise ValueError(
            f"base={name} is a {record.family} model itself; give the plain model it was recast "
            "from, or --base none"
        )
    return Model(name, folder, config, (Setting(),))


def _read(name: str) -> tuple[Path, PreTrainedConfig]:
    folder = find_checkpoint(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} has no config.json; give a checkpoint folder")
    try:
        return folder, AutoConfig.from_pretrained(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"the config of {name} cannot be read: {error}") from error
