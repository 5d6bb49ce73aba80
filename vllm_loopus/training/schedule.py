"""The learning rate as a function of the number of tokens seen."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class CosineByTokens:
    """The share of the peak learning rate: linear warm-up, then a half cosine down to `floor`.

    `tokens`: the tokens seen so far; `LambdaLR` saves it with the scheduler.
    """

    def __init__(self, budget: int, warmup: int, floor: float) -> None:
        self.budget, self.warmup, self.floor = budget, warmup, floor
        self.tokens = 0

    def __call__(self, _: int) -> float:
        if self.tokens < self.warmup:
            return self.tokens / self.warmup
        progress = (self.tokens - self.warmup) / max(self.budget - self.warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.floor + (1 - self.floor) * cosine


def cosine_by_tokens(optimizer: Optimizer, share: CosineByTokens) -> LambdaLR:
    """A scheduler whose `step()` sets each parameter group to `share` of its learning rate."""
    return LambdaLR(optimizer, share)
