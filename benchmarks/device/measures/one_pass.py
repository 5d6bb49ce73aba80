"""One pass of the reasoning block over sequences of one row each, called as a step calls it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_loopus.serving.step.chunks import Chunks

LENGTH = 96  # positions of each sequence


@dataclass
class OnePass:
    """A pass over rows at depth 2: call it for the outputs, a tuple of [rows, H]."""

    region: Any  # `serving.worker.regions.Region`
    layout: Any
    state: torch.Tensor  # [rows, H]

    @classmethod
    def of(cls, runner: Any, rows: int) -> "OnePass":
        """On an engine that has run nothing: blocks of its K/V memory are taken from the first."""
        tables, regions = runner._sequences._tables, runner._sequences._executor._regions
        config = runner.vllm_config.model_config
        blocks = -(-LENGTH // tables.block_size)
        tables.reserve(rows)
        for index in range(rows):
            own = list(range(1 + index * blocks, 1 + (index + 1) * blocks))
            tables.add(index, [own for _ in range(config.hf_config.max_loops)], 0)
        every = np.ones(rows, dtype=np.int64)
        layout = tables.layout(
            Chunks(np.arange(rows), 2 * every, (LENGTH - 1) * every, LENGTH * every, every > 0)
        )
        draw = torch.Generator().manual_seed(0)
        state = torch.randn(rows, config.get_hidden_size(), generator=draw)
        return cls(regions.reasoning, layout, state.to(runner.device, config.dtype))

    def __call__(self, padded: bool = True) -> tuple[torch.Tensor, ...]:
        """`padded`: as a graph where the engine has graphs."""
        padding = self.region._padding
        if not padded:
            self.region._padding = None
        try:
            outputs: tuple[torch.Tensor, ...] = self.region(
                self.layout, self.state, None, None
            ).outputs
            return outputs
        finally:
            self.region._padding = padding

    def compute(self) -> tuple[torch.Tensor, ...]:
        """The model's part alone, over rows that are on the device already: what a graph can hold.

        Call it inside `attention()`.
        """
        outputs: tuple[torch.Tensor, ...] = self.region._run(
            self.state, self._rows.positions, None, None
        )
        return outputs

    def attention(self) -> Any:
        """The context that `compute` needs."""
        self._rows = self.region._attention.rows(self.layout, None)
        return self.region._attention.over(self._rows, self.region._names)


def difference(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> float:
    """The greatest, of the greatest value; NaN where one is."""
    pairs = zip(one, other, strict=True)
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6))
        for a, b in pairs
    )
