"""The decoder's output of a step, and what model runners get of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_loopus.serving.step.chunks import Ints
from vllm_loopus.serving.worker.transfer import to_device


@dataclass
class DecodedRows:
    """The decoder's output of a step: hidden states of newest positions, and whose they are."""

    hidden: torch.Tensor | None = None  # [len(sequences), H]
    sequences: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass
class Decoded:
    """Hidden states of newest positions, and whose they are."""

    hidden: torch.Tensor | None = None  # [len(request_ids), H]
    request_ids: list[str] = field(default_factory=list)

    def rows_in(self, request_ids: Sequence[str]) -> NDArray[np.int64]:
        """Where those that have been decoded are among `request_ids`, in the order in which they
        were decoded."""
        if self.request_ids == list(request_ids):
            return np.arange(len(self.request_ids))
        row = {request_id: index for index, request_id in enumerate(request_ids)}
        return np.array([row[request_id] for request_id in self.request_ids], dtype=np.int64)

    def of(self, values: torch.Tensor, request_ids: Sequence[str]) -> torch.Tensor:
        """Of `values` [len(request_ids)], those of the decoded sequences, in their order."""
        if self.request_ids == list(request_ids):
            return values
        return values.index_select(0, to_device(self.rows_in(request_ids), values.device))

    def in_order(self, request_ids: Sequence[str]) -> torch.Tensor:
        """The hidden states [len(request_ids), H] of `request_ids`, in their order; zeros for those
        that have not been decoded."""
        assert self.hidden is not None
        if self.request_ids == list(request_ids):
            return self.hidden
        rows = to_device(self.rows_in(request_ids), self.hidden.device)
        result = self.hidden.new_zeros(len(request_ids), self.hidden.shape[-1])
        return result.index_copy_(0, rows, self.hidden)
