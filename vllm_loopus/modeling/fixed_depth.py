"""The exit rule of models without one: every token runs to its budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_loopus.modeling.exit_rule import ExitRule, Number

NONE = "none"  # the `halting_strategy`


@dataclass(frozen=True)
class FixedDepth(ExitRule):
    """Never exits below `max_loops`, and looks at no evidence."""

    @classmethod
    def from_config(cls, config: Any) -> "FixedDepth":
        return cls(NONE, config.exit_threshold, config.min_loops, config.max_loops)

    def evidence(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.zeros_like(values["step_length"])

    def compared(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return evidence, carry

    def checked_at(self, depth: Number) -> bool:
        return False

    def predetermined(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        return depth >= max_loops

    def __str__(self) -> str:
        return "none: every token runs to its max_loops"
