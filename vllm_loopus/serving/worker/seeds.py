"""Seeds of running sequences, for models whose first state is noise."""

import numpy as np
import torch

from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.model.seam import LoopedModel
from vllm_loopus.serving.step.chunks import Chunks
from vllm_loopus.serving.worker.row_layout import RowLayout
from vllm_loopus.serving.worker.transfer import to_device


class Seeds:
    """The seed of each sequence, by its row; that of the engine for requests without one."""

    def __init__(self, model: LoopedModel, own: int, device: torch.device) -> None:
        """`own`: the engine's seed."""
        self._used = model.reads_seed
        self._own, self._device = _signed(own), device
        self._seeds = np.zeros(8, dtype=np.int64)

    def add(self, index: int, knobs: RequestKnobs) -> None:
        """A sequence gets the row `index`."""
        if index >= len(self._seeds):
            self._seeds = np.pad(self._seeds, (0, max(index + 1, 2 * len(self._seeds))))
        self._seeds[index] = self._own if knobs.seed is None else _signed(knobs.seed)

    def with_seeds(
        self, ids: torch.Tensor, chunks: Chunks, layout: RowLayout
    ) -> tuple[torch.Tensor, ...]:
        """What the encoder takes: token ids [T], and for a model that reads them seeds [T]."""
        if not self._used:
            return (ids,)
        seeds = self._seeds[chunks.sequence[layout.spans.chunk]]
        return ids, to_device(seeds, self._device)


def _signed(seed: int) -> int:
    """The lowest 64 bits of a seed, as an int64."""
    return (seed + 2**63) % 2**64 - 2**63
