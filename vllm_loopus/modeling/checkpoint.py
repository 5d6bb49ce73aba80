"""Tensor names of a LoopUS checkpoint, in every format that was ever written."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from vllm_loopus.config import LoopUSConfig

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
# Rotary tables that some savers write; every model builds its own.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def current_name(name: str) -> str:
    """The current name of a tensor: wrappers of data parallel training and old block names go."""
    name = name.removeprefix("module.").replace(".module.", ".")
    if name.startswith("plateau."):
        name = "reasoning." + name.removeprefix("plateau.")
    return name


def expected_shapes(config: LoopUSConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor a checkpoint of this config must hold."""
    from vllm_loopus.modeling.model import LoopUSForCausalLM

    with torch.device("meta"):
        model = LoopUSForCausalLM(copy.deepcopy(config))  # it sets attention options
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@dataclass
class CheckpointCheck:
    """Compares the tensors that pass by with what a config expects.

    `passed()` renames them and holds back the ones that do not fit; `raise_if_wrong()` then names
    everything that is missing, unexpected or misshapen at once.
    """

    expected: dict[str, torch.Size]
    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    def passed(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for original, tensor in weights:
            name = current_name(original)
            if name.endswith(IGNORED_SUFFIXES):
                continue
            if name not in self.expected:
                self.unexpected.append(original)
            elif tensor.shape != self.expected[name]:
                self.seen.add(name)
                self.misshapen.append(
                    f"{original} is {list(tensor.shape)}, expected {list(self.expected[name])}"
                )
            else:
                self.seen.add(name)
                yield name, tensor

    def raise_if_wrong(self, source: str) -> None:
        """Raises `ValueError` listing the wrong tensors of `source`."""
        raise_if_wrong(
            source, sorted(set(self.expected) - self.seen), self.unexpected, self.misshapen
        )


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
