"""The amount of work that an engine has done."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The work of an engine so far, from its metrics.

    - `positions`: tokens that entered the loop. `rows`: rows of all passes.
    - `exits`: decoded tokens, where a scored text counts once. `depths`: sum of their exit depths.
    """

    positions: float = 0
    rows: float = 0
    exits: float = 0
    depths: float = 0

    def __sub__(self, before: "Work") -> "Work":
        return Work(
            *(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__)
        )

    @property
    def passes_per_token(self) -> float | None:
        """Mean passes of the reasoning block per token, including catch-up."""
        return self.rows / self.positions if self.positions else None

    @property
    def mean_exit_depth(self) -> float | None:
        """Mean exit depth; a scored text counts once."""
        return self.depths / self.exits if self.exits else None
