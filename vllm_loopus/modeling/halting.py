"""The exit rule of LoopUS: the three halting strategies of the paper and the released code."""

from dataclasses import dataclass, replace

import torch

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.exit_rule import Number

MAX_HAZARD = 1 - 1e-7


@dataclass(frozen=True)
class HaltingRule:
    """The `ExitRule` of LoopUS models.

    Depth r is *evaluated* if `r % exit_interval == 0` or `r == max_loops`. No token exits at a
    depth below `min_loops`, but `cdf` still accumulates the evaluated depths there. The evidence is
    the confidence `q`, or for `convergence` the step length `||h^r - h^(r-1)||_2`. The carry of
    `cdf` is the product of `1 - q` over the depths evaluated so far.
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

    @property
    def first_carry(self) -> tuple[float, ...]:
        return (1.0,) if self.strategy == "cdf" else ()

    @property
    def reads_step_length(self) -> bool:
        """Whether the evidence is the step length, not the confidence."""
        return self.strategy == "convergence"

    def evidence(self, confidence: torch.Tensor, step_length: torch.Tensor) -> torch.Tensor:
        """The input [B] that the strategy uses as evidence."""
        return step_length if self.reads_step_length else confidence

    def with_knobs(
        self, *, exit_threshold: torch.Tensor, min_loops: torch.Tensor, max_loops: torch.Tensor
    ) -> "HaltingRule":
        return replace(
            self, exit_threshold=exit_threshold, min_loops=min_loops, max_loops=max_loops
        )

    def satisfied(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask [B] of the rows whose criterion holds at `depth`, without regard to `min_loops`,
        and the new carry [B, C]."""
        depth = torch.as_tensor(depth, device=evidence.device)
        evaluated = (depth % self.exit_interval == 0) | (depth >= self.max_loops)
        if self.strategy == "convergence":
            return evidence < self.convergence_epsilon, carry
        if self.strategy == "cdf":
            survival = carry[:, 0]
            survival = torch.where(
                evaluated, survival * (1 - evidence.clamp(max=MAX_HAZARD)), survival
            )
            return evaluated & (1 - survival > self.exit_threshold), survival[:, None]
        return evaluated & (evidence > self.exit_threshold), carry

    def exits(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        early, carry = self.satisfied(depth, evidence, carry)
        depth = torch.as_tensor(depth, device=early.device)
        return (early & (depth >= self.min_loops)) | (depth >= self.max_loops), carry

    def predetermined(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        if depth >= max_loops:
            return True
        if min_loops >= max_loops:
            return False
        if self.strategy == "convergence":
            return False if depth < min_loops else None
        if exit_threshold >= 1 or depth % self.exit_interval:  # `q` is at most 1
            return False
        return False if depth < min_loops and self.strategy != "cdf" else None

    def __str__(self) -> str:
        if self.strategy == "convergence":
            return f"convergence: exits when a loop moves the state by < {self.convergence_epsilon}"
        every = "every loop" if self.exit_interval == 1 else f"every {self.exit_interval} loops"
        value = "confidence" if self.strategy == "threshold" else "accumulated confidence"
        return (
            f"{self.strategy}: exits when the {value} is > {self.exit_threshold}, checked {every}"
        )
