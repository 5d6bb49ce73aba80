"""Tokens that the host has not read: those that were sampled, and guesses."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.distributed.parallel_state import GroupCoordinator

from vllm_loopus.serving.model.seam import LoopedModel
from vllm_loopus.serving.step.chunks import Bools, Ints
from vllm_loopus.serving.step.staircase import Staircases
from vllm_loopus.serving.worker.transfer import to_device


@dataclass(frozen=True)
class SampledTokens:
    """Tokens that are still on the device: `ids` [n] of `sequences` [n]."""

    sequences: Ints
    ids: torch.Tensor


class LikelyTokens:
    """The last guess of each sequence: what the decoder takes for most likely. A position may begin
    with it before the host has read it."""

    def __init__(self, model: LoopedModel, group: GroupCoordinator, stairs: Staircases) -> None:
        """`group`: the tensor-parallel one; the guess of its first rank counts."""
        self._model, self._group, self._stairs = model, group, stairs
        self._ids = torch.zeros(0, dtype=torch.int32)  # [S]

    def guess(self, sequences: Ints, hidden: torch.Tensor, begins: Bools | None) -> torch.Tensor:
        """The most likely tokens [n] for the decoder's hidden states [n, H] of `sequences` [n].
        Those of `begins` [n] are guesses; None: all."""
        likely = self._model.get_top_tokens(hidden).to(torch.int32)
        ids: torch.Tensor = self._group.broadcast(likely, src=0)
        if len(self._ids) < self._stairs.capacity:
            grown = ids.new_zeros(self._stairs.capacity)
            grown[: len(self._ids)] = self._ids
            self._ids = grown
        guesses = ids
        if begins is not None and not begins.all():
            sequences = sequences[begins]
            guesses = ids.index_select(0, to_device(np.flatnonzero(begins), ids.device))
        self._ids.index_copy_(0, to_device(sequences, ids.device), guesses)
        return ids

    def of(self, sequences: Ints) -> torch.Tensor:
        """The last guesses [n] of `sequences` [n]."""
        return self._ids.index_select(0, to_device(sequences, self._ids.device))
