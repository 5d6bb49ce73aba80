"""Tensor names of a LoopUS checkpoint, in every format that was ever written."""

from collections.abc import Iterable, Iterator
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
# A checkpoint that holds one of these has a tokenizer of its own.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
)
# Others are a quantised checkpoint's, or no weights.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Rotary tables that some savers write; every model builds its own.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def current_name(name: str) -> str:
    """The current name of a tensor: wrappers of data parallel training and old block names go."""
    name = name.removeprefix("module.").replace(".module.", ".")
    if name.startswith("plateau."):
        name = "reasoning." + name.removeprefix("plateau.")
    return name


@dataclass
class CheckpointCheck:
    """Compares the tensors that pass by with what a config expects.

    `passed()` renames them and holds back the ones that do not fit; `raise_if_wrong()` then names
    everything that is missing, unexpected, misshapen or no weights at once. `dtype` is the one that
    they are to be loaded in.
    """

    expected: dict[str, torch.Size]
    dtype: torch.dtype = torch.float32
    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    def passed(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for original, tensor in weights:
            name = current_name(original)
            if name.endswith(IGNORED_SUFFIXES):
                continue
            if name not in self.expected:
                self.unexpected.append(original)
            elif not isinstance(tensor, torch.Tensor):
                self.seen.add(name)
                self.unusable.append(f"{original} is a {type(tensor).__name__}, no tensor")
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
        """Why a tensor's values cannot be served; None where they can."""
        if tensor.dtype not in DTYPES:
            return f"is {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}"
        largest = torch.linalg.vector_norm(tensor, ord=torch.inf).item() if tensor.numel() else 0.0
        if largest <= torch.finfo(self.dtype).max:
            return None
        return f"holds a value that is NaN, infinite or beyond the range of {self.dtype}"

    def raise_if_wrong(self, source: str) -> None:
        """Raises `ValueError` listing the wrong tensors of `source`."""
        raise_if_wrong(
            source, sorted(set(self.expected) - self.seen), self.unexpected, self.misshapen
        )
        if self.unusable:
            raise ValueError(
                f"the weights of {source} cannot be served: {_shortened(self.unusable)}. The "
                "checkpoint is damaged, of a run that diverged, or quantised without a "
                "quantization_config; copy it again or take another one."
            )


def readable(weights: Iterable[T], source: str) -> Iterator[T]:
    """The `weights` as they are. Raises `ValueError` naming what is truncated, no checkpoint, or a
    pickle of anything but tensors (it is not run) among the files of `source`."""
    try:
        yield from weights
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        damaged = [file.name for file in sorted(Path(source).glob("*.safetensors")) if _cut(file)]
        named = f" ({', '.join(damaged)})" if damaged else ""
        raise ValueError(
            f"the weights of {source} cannot be read{named}: {error}. Files must be whole and hold "
            "tensors alone (a pickle with more is not run); copy them again, or convert them to "
            "safetensors where you trust them."
        ) from error


def _cut(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return False
    except (SafetensorError, OSError):
        return True


def raise_if_wrong(
    source: str, missing: list[str], unexpected: list[str], misshapen: list[str]
) -> None:
    """Raises `ValueError` naming the wrong tensors of the checkpoint `source`, if any."""
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        told = "; ".join(
            f"{kind}: {_shortened(names)}" for kind, names in problems.items() if names
        )
        raise ValueError(
            f"the weights of {source} do not fit its config.json ({told}). "
            "Check that the layer indices and base_config belong to these weights."
        )


def _shortened(names: list[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
