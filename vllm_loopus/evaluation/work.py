"""How much an engine has computed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What an engine has computed so far, from its metrics.

    - `positions`: tokens that entered the loop; `rows`: positions times passes.
    - `exits`: tokens decoded, a scored text counting once; `depths`: the sum of their exit depths.
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
        """Passes of the reasoning block that a token took, catching up included."""
        return self.rows / self.positions if self.positions else None

    @property
    def mean_exit_depth(self) -> float | None:
        """A scored text counts once: it has one depth."""
        return self.depths / self.exits if self.exits else None
