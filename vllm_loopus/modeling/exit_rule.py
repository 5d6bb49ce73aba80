"""What an exit rule is: it decides after each pass which tokens exit. Both sides use the same.

Everything is elementwise over rows, so a batch may hold rows at different depths and with knobs of
their own: depths and knobs are numbers, or tensors [B].
"""

from typing import Protocol, Self

import torch

Number = float | torch.Tensor


class ExitRule(Protocol):
    """Decides from one number for each row and pass, its *evidence*, and from what it carries from
    pass to pass for each row, its *carry*: `len(first_carry)` numbers, none for most rules."""

    @property
    def first_carry(self) -> tuple[float, ...]:
        """The carry before the first pass."""
        ...

    def with_knobs(
        self, *, exit_threshold: torch.Tensor, min_loops: torch.Tensor, max_loops: torch.Tensor
    ) -> Self:
        """The rule with knobs [B] for each row."""
        ...

    def exits(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows exit at `depth`, given their evidence [B] and carry [B, C], float32: the mask
        [B] and the new carry [B, C]. At `max_loops` all do, before `min_loops` none."""
        ...

    def predetermined(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        """Whether a row with these knobs exits at `depth`, if no evidence can change that; None if
        it can, there or later through the carry."""
        ...

    def __str__(self) -> str:
        """The rule in words."""
        ...


class ExitTracker:
    """The exit depths of n tokens, found pass by pass. `depths` [n]: 0 while a token runs."""

    def __init__(self, rule: ExitRule, count: int, device: torch.device | None = None) -> None:
        self._rule = rule
        self._carry = new_carry(rule, count, device)
        self.depths = torch.zeros(count, dtype=torch.long, device=device)

    @property
    def running(self) -> torch.Tensor:
        """Mask [n] of the tokens that have not exited."""
        return self.depths == 0

    def after(self, depth: int, evidence: torch.Tensor) -> torch.Tensor:
        """Mask [n] of the tokens that exit after the pass to `depth`; `evidence` [n]."""
        exits, self._carry = self._rule.exits(depth, evidence, self._carry)
        now = exits & self.running
        self.depths = torch.where(now, depth, self.depths)
        return now


def new_carry(rule: ExitRule, count: int, device: torch.device | None = None) -> torch.Tensor:
    """The carry [count, C] of rows before their first pass."""
    return torch.tensor(rule.first_carry, device=device).expand(count, -1)
