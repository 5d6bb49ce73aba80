"""Measured costs, which the exit quorum weighs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCosts:
    """The costs of a pass and of a boundary that do not depend on the number of rows, in seconds
    (or any unit). A boundary (the decode phase) is everything between the passes of two steps:
    decoder, LM head, sampling, scheduling, encoder."""

    per_pass: float = 2.0
    per_boundary: float = 1.0
