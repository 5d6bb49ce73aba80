"""Ouro's exit rule: the probability of having exited, accumulated over the loops."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vllm_loopus.modeling.exit_rule import ExitRule, Number


@dataclass(frozen=True)
class CumulativeRule(ExitRule):
    """A token exits after the first loop t at which `p_1 + .. + p_t` reaches the threshold, where
    `p_t = lambda_t (1 - lambda_1) .. (1 - lambda_{t-1})` (arXiv 2510.25741).

    The evidence is `lambda_t`, in [0, 1]; every loop counts. The carry has the product, and the sum
    so far; both are added up as Ouro's own code does it, so that a `lambda` of exactly 1.0 reaches
    a threshold of 1.0. No sum reaches more than that.
    """

    values: ClassVar[tuple[str, ...]] = ("confidence",)

    @classmethod
    def from_config(cls, config: Any) -> "CumulativeRule":
        return cls(
            config.halting_strategy, config.exit_threshold, config.min_loops, config.max_loops
        )

    @property
    def first_carry(self) -> tuple[float, ...]:
        return (1.0, 0.0)

    @property
    def comparison(self) -> Literal[">", ">=", "<"]:
        return ">="

    def evidence(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values["confidence"]

    def compared(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        left, reached = carry[:, 0], carry[:, 1]
        reached = (reached + evidence * left).clamp(max=1.0)
        return reached, torch.stack([left * (1 - evidence), reached], dim=-1)

    def predetermined(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        if depth >= max_loops:
            return True
        return False if exit_threshold > 1 or min_loops >= max_loops else None

    def __str__(self) -> str:
        return (
            f"{self.strategy}: exits when the accumulated probability of exiting is >= "
            f"{self.exit_threshold}"
        )
