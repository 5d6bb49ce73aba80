"""Measured costs, which the exit quorum weighs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCosts:
    """The costs of a pass and of a boundary that do not depend on the number of rows, in seconds
    (or any unit). A boundary (the decode phase) is everything between the passes of two steps:
    decoder, LM head, sampling, scheduling, encoder. `per_row`: of a pass. `gap`: from reading a
    pass to launching the next one. `host`: host work in a step, without waiting.

    They are measured on one rank and sent to all, because what they decide has to be the same.
    """

    per_pass: float = 2.0
    per_boundary: float = 1.0
    per_row: float = 0.0
    gap: float = 0.0
    host: float = 0.0
