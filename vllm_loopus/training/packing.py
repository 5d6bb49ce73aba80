"""Packs documents into sequences of equal length and sequences into batches.

Each document has its own positions. transformers separates documents where position ids restart,
if no attention mask is given.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import DataCollatorWithFlattening

from vllm_loopus.training.objective import IGNORED

Document = dict[str, list[int]]
_flatten = DataCollatorWithFlattening(return_tensors="pt")


def pack(documents: Iterable[Document], max_length: int) -> list[list[Document]]:
    """Packs documents into sequences of at most `max_length` tokens (best fit, longest first)."""
    sequences: list[list[Document]] = []
    free: list[tuple[int, int]] = []  # free tokens of a sequence, and its index; sorted
    for document in sorted(documents, key=lambda document: -len(document["input_ids"])):
        length = len(document["input_ids"])
        fitting = bisect_left(free, (length, 0))
        if fitting < len(free):
            left, index = free.pop(fitting)
        else:
            left, index = max_length, len(sequences)
            sequences.append([])
        sequences[index].append(document)
        if left > length:
            insort(free, (left - length, index))
    return sequences


def collate(sequences: Sequence[Sequence[Document]], max_length: int, pad: int) -> dict[str, Any]:
    """Tensors of packed sequences: `input_ids`, `labels`, `position_ids` [B, T], `lengths` [B].

    The end of a sequence is padded with `pad`, as a document without targets.
    """
    batch: dict[str, Any] = {
        "input_ids": torch.full((len(sequences), max_length), pad),
        "labels": torch.full((len(sequences), max_length), IGNORED),
        "position_ids": torch.arange(max_length).repeat(len(sequences), 1),
        "lengths": torch.zeros(len(sequences), dtype=torch.int64),
    }
    for index, documents in enumerate(sequences):
        flat = _flatten(documents)
        length = flat["input_ids"].shape[1]
        for name in ("input_ids", "labels", "position_ids"):
            batch[name][index, :length] = flat[name][0]
        batch["position_ids"][index, length:] -= length
        batch["lengths"][index] = length
    return batch
