"""What depth-wise continuous batching could reach for given costs: the yardstick of the benchmarks.

The policy of the simulator the project started with, extended by what a real run has: prompts that
run to the full depth, the decoder's catch-up, and a finite number of requests (ramp-down). It
shares no code with the engine.

A pass over n rows costs `c0 + c1 n`; a boundary that gives m tokens and runs k rows through the
decoder costs `d0 + d1 m + d2 k`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Milliseconds, see the module's text."""

    c0: float
    c1: float
    d0: float
    d1: float
    d2: float


@dataclass(frozen=True)
class Simulated:
    """`rate`: tokens a second; `passes`: a token; `rows`: a pass."""

    rate: float
    passes: float
    rows: float


def geometric(mean: float, max_depth: int) -> np.ndarray:
    """Probabilities of depths 1..max_depth: a geometric law, truncated, with the given mean."""
    low, high = 1e-9, 1 - 1e-9
    for _ in range(200):
        p = (low + high) / 2
        law = p * (1 - p) ** np.arange(max_depth)
        law[-1] += (1 - p) ** max_depth
        low, high = (p, high) if law @ np.arange(1, max_depth + 1) > mean else (low, p)
    return law / law.sum()


class _Sequence:
    def __init__(self, prompt: int, exits: list[int], max_depth: int) -> None:
        self.exits, self.max_depth = list(exits), max_depth
        self.prompt, self.end = prompt, prompt
        self.done = [0] * (max_depth + 1)
        self.decoded = [0] * (max_depth + 1)
        self.depth = 0

    @property
    def prefilling(self) -> bool:
        return self.end == self.prompt

    @property
    def refined(self) -> bool:
        return self.depth == (self.max_depth if self.prefilling else self.exits[0])

    def deepen(self, policy: str) -> int:
        """One pass: the number of rows it takes."""
        self.depth += 1
        rows = self.end - self.done[self.depth]
        if policy == "last_exited" and not self.prefilling:
            rows = 1
        self.done[self.depth] = self.end
        return rows

    def leave(self, policy: str) -> int:
        """The boundary: rows through the decoder."""
        depth = self.exits.pop(0)
        if policy == "last_exited":
            rows = max(self.prompt - self.decoded[depth], 0) + (not self.prefilling)
        else:
            rows = self.end - self.decoded[depth]
        self.decoded[depth] = self.end
        self.end += 1
        self.depth = 0
        return rows


def simulate(
    costs: Costs,
    exits: list[list[int]],
    prompt: int,
    max_seqs: int,
    max_depth: int,
    policy: str,
    quorum: float,
) -> Simulated:
    """Requests with given exit depths, served `max_seqs` at a time."""
    waiting = [_Sequence(prompt, depths, max_depth) for depths in exits][::-1]
    tokens = sum(map(len, exits))
    running: list[_Sequence] = []
    time, passes, rows = 0.0, 0, 0
    while waiting or running:
        while waiting and len(running) < max_seqs:
            running.append(waiting.pop())
        ready: list[_Sequence] = []
        while len(ready) < max(1, int(quorum * len(running))):
            n = sum(s.deepen(policy) for s in running if not s.refined)
            time += costs.c0 + costs.c1 * n
            passes, rows = passes + 1, rows + n
            ready = [s for s in running if s.refined]
        decoded = sum(s.leave(policy) for s in ready)
        time += costs.d0 + costs.d1 * len(ready) + costs.d2 * decoded
        running = [s for s in running if s.exits]
    return Simulated(1e3 * tokens / time, passes / tokens, rows / passes)


def best(
    costs: Costs,
    exits: list[list[int]],
    prompt: int,
    max_seqs: int,
    max_depth: int,
    policy: str,
    quorums: tuple[float, ...] = (0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0),
) -> tuple[Simulated, float]:
    """The best fixed quorum."""
    runs = [(simulate(costs, exits, prompt, max_seqs, max_depth, policy, q), q) for q in quorums]
    return max(runs, key=lambda run: run[0].rate)
