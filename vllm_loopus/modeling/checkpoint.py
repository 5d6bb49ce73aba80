"""Tensor names of LoopUS checkpoints in all formats, and checks of their tensors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

T = TypeVar("T")
# Regular expressions for transformers' `key_mapping`: old name -> current name.
RENAMED = {r"^module\.": "", r"\.module\.": ".", r"^plateau\.": "reasoning."}
LEGACY_WEIGHTS = "combined_model.pt"
# A checkpoint that contains one of these files has its own tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
)
# Accepted dtypes. Any other dtype belongs to a quantised checkpoint or is not a weight.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Rotary tables that some tools save. They are ignored, because every model computes its own.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def current_name(name: str) -> str:
    """The current name of a tensor, without data-parallel wrappers and old module names."""
    name = name.removeprefix("module.").replace(".module.", ".")
    if name.startswith("plateau."):
        name = "reasoning." + name.removeprefix("plateau.")
    return name


@dataclass
class CheckpointCheck:
    """Compares the tensors of a checkpoint with the `expected` shapes while they are loaded.

    `checked()` yields the valid tensors under their current names and records the others;
    `raise_if_wrong()` then reports all missing, unexpected, misshapen and unusable tensors in one
    error. `dtype`: the dtype that the tensors will be converted to. `rename`: from names in the
    file to the current ones.
    """

    expected: dict[str, torch.Size]
    dtype: torch.dtype = torch.float32
    rename: Callable[[str], str] = current_name
    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    def checked(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The valid ones of `weights`, under their current names."""
        for original, tensor in weights:
            name = self.rename(original)
            if name.endswith(IGNORED_SUFFIXES):
                continue
            if name not in self.expected:
                self.unexpected.append(original)
            elif not isinstance(tensor, torch.Tensor):
                self.seen.add(name)
                self.unusable.append(f"{original} is a {type(tensor).__name__}, not a tensor")
            elif tensor.shape != self.expected[name]:
                self.seen.add(name)
                self.misshapen.append(
                    f"{original} is {list(tensor.shape)}, expected {list(self.expected[name])}"
                )
            else:
                self.seen.add(name)
                if (problem := self._problem(tensor)) is None:
                    yield name, tensor
                else:
                    self.unusable.append(f"{original} {problem}")

    def _problem(self, tensor: torch.Tensor) -> str | None:
        """Why a tensor's values cannot be served; None if they can."""
        if tensor.dtype not in DTYPES:
            return f"is {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}"
        largest = torch.linalg.vector_norm(tensor, ord=torch.inf).item() if tensor.numel() else 0.0
        if largest <= torch.finfo(self.dtype).max:
            return None
        return f"holds a value that is NaN, infinite or outside the range of {self.dtype}"

    def raise_if_wrong(self, source: str, partial: bool = False) -> None:
        """Raises `ValueError` that lists the wrong tensors of `source`, if any. `partial`: others
        come later, or stay as they are."""
        missing = [] if partial else sorted(set(self.expected) - self.seen)
        raise_if_wrong(source, missing, self.unexpected, self.misshapen)
        if self.unusable:
            raise ValueError(
                f"the weights of {source} cannot be served: {_shortened(self.unusable)}. The "
                "checkpoint is damaged, comes from a training run that diverged, or is quantised "
                "without a quantization_config; copy it again or use another checkpoint."
            )


def explaining_read_errors(weights: Iterable[T], source: str) -> Iterator[T]:
    """Yields `weights` unchanged, and turns errors of reading them into `ValueError`.

    The error names the files of `source` that are truncated or not checkpoints. Pickles that
    contain anything but tensors are refused without being executed.
    """
    try:
        yield from weights
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        files = sorted(Path(source).glob("*.safetensors"))
        damaged = [file.name for file in files if _is_damaged(file)]
        named = f" ({', '.join(damaged)})" if damaged else ""
        raise ValueError(
            f"the weights of {source} cannot be read{named}: {error}. Files must be complete and "
            "contain only tensors (a pickle with anything else is not run); copy them again, or "
            "convert them to safetensors if you trust them."
        ) from error


def _is_damaged(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return False
    except (SafetensorError, OSError):
        return True


def raise_if_wrong(
    source: str, missing: list[str], unexpected: list[str], misshapen: list[str]
) -> None:
    """Raises `ValueError` that names the wrong tensors of the checkpoint `source`, if any."""
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        details = "; ".join(
            f"{kind}: {_shortened(names)}" for kind, names in problems.items() if names
        )
        raise ValueError(
            f"the weights of {source} do not fit its config.json ({details}). "
            "Check that config.json, with its layers and sizes, belongs to these weights."
        )


def _shortened(names: list[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
