"""The interface of exit rules, which decide after each pass which tokens exit the loop.

The reference model and the engine use the same rules. All operations are elementwise over rows
(one token each), so a batch can mix depths and knobs: both are numbers, or tensors [B].
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch

Number = float | torch.Tensor
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt}


@dataclass(frozen=True)
class ExitRule(ABC):
    """Decides from the *evidence*, one number or the logits of each row and pass, and from the
    *carry*, the `len(first_carry)` numbers that the rule keeps for each row between passes (often
    none).

    - `strategy`: its name, `halting_strategy` of the config.
    - `exit_threshold`, `min_loops`, `max_loops`: knobs, numbers or tensors [B].
    - `values`: what the evidence may be made of, by the names that the reference model uses
      (`LoopedReference.exit_values`).

    A subclass says in `compared` which number is compared with the limit, the value of the field
    `limit_name`, by `comparison`. At `max_loops` all rows exit; at depths below `min_loops` none
    does.
    """

    strategy: str
    exit_threshold: Number
    min_loops: Number
    max_loops: Number

    values: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any) -> Self:
        """The rule of a checkpoint."""

    @property
    def first_carry(self) -> tuple[float, ...]:
        """The carry before the first pass."""
        return ()

    @abstractmethod
    def evidence(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The evidence [B], float32, from the values [B] of a pass by name."""

    @abstractmethod
    def compared(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is compared with the limit at `depth` [B], and the new carry [B, C], from evidence
        [B] and carry [B, C] in float32."""

    @property
    def limit_name(self) -> str:
        """The field that holds the limit."""
        return "exit_threshold"

    @property
    def comparison(self) -> Literal[">", ">=", "<"]:
        """How a row that exits compares with the limit."""
        return ">"

    def checked_at(self, depth: Number) -> bool | torch.Tensor:
        """Whether the criterion is looked at after `depth` passes."""
        return True

    def satisfied(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask [B] of the rows whose criterion holds at `depth`, without regard to `min_loops`
        and `max_loops`, and the new carry [B, C]."""
        compared, carry = self.compared(depth, evidence, carry)
        holds = COMPARISONS[self.comparison](compared, getattr(self, self.limit_name))
        checked = torch.as_tensor(self.checked_at(depth), device=holds.device)
        return holds & checked, carry

    def with_knobs(
        self, *, exit_threshold: torch.Tensor, min_loops: torch.Tensor, max_loops: torch.Tensor
    ) -> Self:
        """The same rule with individual knobs [B] for each row."""
        return replace(
            self, exit_threshold=exit_threshold, min_loops=min_loops, max_loops=max_loops
        )

    def exits(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows exit at `depth`, from their evidence [B] and carry [B, C] in float32.

        Returns the mask [B] and the new carry [B, C].
        """
        early, carry = self.satisfied(depth, evidence, carry)
        depth = torch.as_tensor(depth, device=early.device)
        return (early & (depth >= self.min_loops)) | (depth >= self.max_loops), carry

    @abstractmethod
    def predetermined(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        """Whether a row with these knobs exits at `depth`, if that does not depend on evidence.

        None if the evidence matters, at this depth or at a deeper one through the carry.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The rule in words."""


class ExitTracker:
    """Applies a rule pass by pass to n tokens. `depths` [n]: the exit depths, 0 before the exit."""

    def __init__(self, rule: ExitRule, count: int, device: torch.device | None = None) -> None:
        self._rule = rule
        self._carry = new_carry(rule, count, device)
        self.depths = torch.zeros(count, dtype=torch.long, device=device)

    @property
    def running(self) -> torch.Tensor:
        """Mask [n] of the tokens that have not exited yet."""
        return self.depths == 0

    def update(self, depth: int, evidence: torch.Tensor) -> torch.Tensor:
        """Mask [n] of the tokens that exit at `depth`, after the pass that reached it.

        `evidence` [n]: that of this pass.
        """
        exits, self._carry = self._rule.exits(depth, evidence, self._carry)
        now = exits & self.running
        self.depths = torch.where(now, depth, self.depths)
        return now


def new_carry(rule: ExitRule, count: int, device: torch.device | None = None) -> torch.Tensor:
    """The carry [count, C] of rows before their first pass."""
    return torch.tensor(rule.first_carry, device=device).expand(count, -1)
