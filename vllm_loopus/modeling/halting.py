"""When a token has been refined enough: the halting rule, shared by both sides.

Everything is elementwise over rows, so a batch may hold rows at different depths and with knobs of
their own: depth and knobs are numbers or tensors [B].
"""

from dataclasses import dataclass

import torch
from torch import nn

from vllm_loopus.config import LoopUSConfig

MAX_HAZARD = 1 - 1e-7
Number = float | torch.Tensor


def build_confidence_head(hidden_size: int) -> nn.Sequential:
    """The confidence head: `sigmoid` of its output [..., 1] is `q`. Named `q_head` on disk."""
    return nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, 1))


def head_input(
    confidence_input: str, update: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """What the confidence head reads after a pass, shapes [..., H]: the gated state `after`
    (`state`), or how far the `update` is from the state `before` (`update`)."""
    return after if confidence_input == "state" else update - before


@dataclass(frozen=True)
class HaltingRule:
    """Decides after each pass which rows leave.

    Depth r is *evaluated* when `r % exit_interval == 0` and at `max_loops`. `min_loops` forbids
    leaving earlier; depths below it still count as evaluated for `cdf`.
    """

    strategy: str
    exit_threshold: Number
    exit_interval: int
    min_loops: Number
    max_loops: Number
    convergence_epsilon: float

    @classmethod
    def from_config(cls, config: LoopUSConfig) -> "HaltingRule":
        return cls(
            strategy=config.halting_strategy,
            exit_threshold=config.exit_threshold,
            exit_interval=config.exit_interval,
            min_loops=config.min_loops,
            max_loops=config.max_loops,
            convergence_epsilon=config.convergence_epsilon,
        )

    def satisfied(
        self,
        depth: Number,
        *,
        confidence: torch.Tensor,
        step_length: torch.Tensor,
        survival: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For which rows the strategy's criterion holds at `depth`, whatever `min_loops` says.

        `confidence` is `q` [B], `step_length` is `||h^r - h^(r-1)||_2` [B], `survival` the product
        of `1 - q` over the depths evaluated so far [B] (ones before the first pass). Returns the
        mask [B] and the new survival [B].
        """
        depth = torch.as_tensor(depth, device=confidence.device)
        evaluated = (depth % self.exit_interval == 0) | (depth >= self.max_loops)
        if self.strategy == "convergence":
            return step_length < self.convergence_epsilon, survival
        if self.strategy == "cdf":
            survival = torch.where(
                evaluated, survival * (1 - confidence.clamp(max=MAX_HAZARD)), survival
            )
            return evaluated & (1 - survival > self.exit_threshold), survival
        return evaluated & (confidence > self.exit_threshold), survival

    def leaves(self, depth: Number, **values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows leave at `depth`: the mask [B] and the new survival [B].

        Takes what `satisfied` takes.
        """
        early, survival = self.satisfied(depth, **values)
        depth = torch.as_tensor(depth, device=early.device)
        return (early & (depth >= self.min_loops)) | (depth >= self.max_loops), survival

    def foregone(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        """Whether a row with these knobs leaves at `depth`, where nothing computed has a say in it.

        None where the criterion has: there, or later by what it adds up there (`cdf`).
        """
        if depth >= max_loops:
            return True
        if min_loops >= max_loops:
            return False
        if self.strategy == "convergence":
            return False if depth < min_loops else None
        if exit_threshold >= 1 or depth % self.exit_interval:  # `q` is at most 1
            return False
        return False if depth < min_loops and self.strategy != "cdf" else None


class ExitTracker:
    """Where each of n tokens leaves, taken along pass by pass. `depths` [n]: 0 while it runs."""

    def __init__(self, rule: HaltingRule, count: int, device: torch.device | None = None) -> None:
        self._rule = rule
        self._survival = torch.ones(count, device=device)
        self.depths = torch.zeros(count, dtype=torch.long, device=device)

    @property
    def running(self) -> torch.Tensor:
        """Mask [n] of those that have not left."""
        return self.depths == 0

    def after(
        self, depth: int, confidence: torch.Tensor, step_length: torch.Tensor
    ) -> torch.Tensor:
        """Mask [n] of those that leave now; takes what `HaltingRule.satisfied` takes."""
        leaves, self._survival = self._rule.leaves(
            depth, confidence=confidence, step_length=step_length, survival=self._survival
        )
        now = leaves & self.running
        self.depths = torch.where(now, depth, self.depths)
        return now
