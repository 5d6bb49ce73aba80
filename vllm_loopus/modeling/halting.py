"""The exit rule of LoopUS: the three halting strategies of the paper and the released code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.exit_rule import ExitRule, Number

MAX_HAZARD = 1 - 1e-7


@dataclass(frozen=True)
class HaltingRule(ExitRule):
    """The exit rule of LoopUS models.

    Depth r is *evaluated* if `r % exit_interval == 0` or `r == max_loops`. No token exits at a
    depth below `min_loops`, but `cdf` still accumulates the evaluated depths there. The evidence is
    the confidence `q`, or for `convergence` the step length `||h^r - h^(r-1)||_2`. The carry of
    `cdf` is the product of `1 - q` over the depths evaluated so far.
    """

    exit_interval: int
    convergence_epsilon: float

    values: ClassVar[tuple[str, ...]] = ("confidence", "step_length")

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

    def evidence(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["step_length" if self.reads_step_length else "confidence"]

    @property
    def limit_name(self) -> str:
        return "convergence_epsilon" if self.reads_step_length else "exit_threshold"

    @property
    def comparison(self) -> Literal[">", ">=", "<"]:
        return "<" if self.reads_step_length else ">"

    def checked_at(self, depth: Number) -> bool | torch.Tensor:
        if self.reads_step_length:
            return True
        depth = torch.as_tensor(depth)
        return (depth % self.exit_interval == 0) | (depth >= self.max_loops)

    def compared(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.strategy != "cdf":
            return evidence, carry
        survival = carry[:, 0]
        checked = torch.as_tensor(self.checked_at(depth), device=evidence.device)
        survival = torch.where(checked, survival * (1 - evidence.clamp(max=MAX_HAZARD)), survival)
        return 1 - survival, survival[:, None]

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
