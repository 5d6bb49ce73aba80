"""Rows of a batch: whole documents side by side, each with positions of its own.

transformers keeps documents apart where position ids restart and no attention mask is given. Rows
have one length, so that attention costs as much in a large batch as in a small one, row by row.
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
    """Rows of documents with at most `max_length` tokens: best fit, longest documents first."""
    rows: list[list[Document]] = []
    free: list[tuple[int, int]] = []  # tokens left in a row, and the row; sorted
    for document in sorted(documents, key=lambda document: -len(document["input_ids"])):
        length = len(document["input_ids"])
        fitting = bisect_left(free, (length, 0))
        if fitting < len(free):
            left, row = free.pop(fitting)
        else:
            left, row = max_length, len(rows)
            rows.append([])
        rows[row].append(document)
        if left > length:
            insort(free, (left - length, row))
    return rows


def collate(rows: Sequence[Sequence[Document]], max_length: int, pad: int) -> dict[str, Any]:
    """Tensors of rows: `input_ids`, `labels`, `position_ids` [B, T] and `lengths` [B].

    What is left of a row is filled with `pad`, as a document without targets.
    """
    batch: dict[str, Any] = {
        "input_ids": torch.full((len(rows), max_length), pad),
        "labels": torch.full((len(rows), max_length), IGNORED),
        "position_ids": torch.arange(max_length).repeat(len(rows), 1),
        "lengths": torch.zeros(len(rows), dtype=torch.int64),
    }
    for index, row in enumerate(rows):
        flat = _flatten(row)
        length = flat["input_ids"].shape[1]
        for name in ("input_ids", "labels", "position_ids"):
            batch[name][index, :length] = flat[name][0]
        batch["position_ids"][index, length:] -= length
        batch["lengths"][index] = length
    return batch
