"""The loop itself: which block runs on which rows at which depth.

It knows nothing of a model runner. It asks for blocks that map states to states and for a way to
select the plane of a depth, and gets rows [T, H]; who built the batch does not matter.
"""

from contextlib import AbstractContextManager
from typing import Protocol

import torch


class LoopedBlocks(Protocol):
    """What the loop runs. Rows are tokens: hidden states [T, H], positions [T]."""

    def reason(self, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`h^{r-1}` -> `h^r`: one pass of the reasoning block and its gate."""
        ...

    def decode(self, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`h^d` -> normed hidden states, ready for the LM head."""
        ...

    def at_depth(self, depth: int) -> AbstractContextManager[None]:
        """Inside, attention uses the K/V plane of `depth`."""
        ...


def run_fixed_depth(
    blocks: LoopedBlocks, encoded: torch.Tensor, positions: torch.Tensor, max_loops: int
) -> torch.Tensor:
    """Takes every row to depth `max_loops` and decodes it there: [T, H] -> [T, H]."""
    state = encoded
    for depth in range(1, max_loops + 1):
        with blocks.at_depth(depth):
            state = blocks.reason(state, positions)
    with blocks.at_depth(max_loops):
        return blocks.decode(state, positions)
