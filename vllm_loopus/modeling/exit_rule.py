"""The interface of exit rules, which decide after each pass which tokens exit the loop.

The reference model and the engine use the same rules. All operations are elementwise over rows
(one token each), so a batch can mix depths and knobs: both are numbers, or tensors [B].
"""

from typing import Protocol, Self

import torch

Number = float | torch.Tensor


class ExitRule(Protocol):
    """Decides from the *evidence*, one number for each row and pass, and from the *carry*, the
    `len(first_carry)` numbers that the rule keeps for each row between passes (often none)."""

    @property
    def first_carry(self) -> tuple[float, ...]:
        """The carry before the first pass."""
        ...

    def with_knobs(
        self, *, exit_threshold: torch.Tensor, min_loops: torch.Tensor, max_loops: torch.Tensor
    ) -> Self:
        """The same rule with individual knobs [B] for each row."""
        ...

    def exits(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows exit at `depth`, from their evidence [B] and carry [B, C] in float32.

        Returns the mask [B] and the new carry [B, C]. At `max_loops` all rows exit; at depths
        below `min_loops` none does.
        """
        ...

    def predetermined(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        """Whether a row with these knobs exits at `depth`, if that does not depend on evidence.

        None if the evidence matters, at this depth or at a deeper one through the carry.
        """
        ...

    def __str__(self) -> str:
        """The rule in words."""
        ...


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
