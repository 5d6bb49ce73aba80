"""What depth-wise continuous batching could reach for given costs: the yardstick of the benchmarks.

The policy of the simulator the project started with, extended by what a real run has: prompts (to
the full depth, or lazily to the one that their first token exits at), the decoder's catch-up, and
a finite number of requests (ramp-down). It shares no code with the engine.

A pass over n rows costs `c0 + c1 n`; a boundary that gives m tokens and runs k rows through the
decoder costs `d0 + d1 m + d2 k`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

AUTO = "auto"
QUORUMS = (0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)


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


def geometric_parameter(mean: float, limit: int) -> float:
    """The probability p of a geometric law that, cut at `limit`, has this mean."""
    low, high = 1e-9, 1.0
    for _ in range(100):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** limit) / p > mean else (low, p)
    return high


def geometric(mean: float, max_depth: int) -> NDArray[np.float64]:
    """Probabilities [max_depth] of depths from 1 on: a geometric law, truncated, with this mean."""
    if mean >= max_depth:
        return np.eye(max_depth)[-1]
    p = geometric_parameter(mean, max_depth)
    law = p * (1 - p) ** np.arange(max_depth)
    law[-1] += (1 - p) ** max_depth
    return law / law.sum()


@dataclass(frozen=True)
class Policy:
    """`kv`: `exact` or `last_exited`; `max_seqs` sequences at a time.

    `quorum`: the share of them whose token must have exited before a boundary, or `auto`: the
    boundary comes when one more pass would cost more, for each exit that it is expected to bring,
    than each token that has exited pays for the boundary now. `lazy`: prompts go no deeper than
    their first token. `decoder_attends`: whether the decoder has K/V to catch up with.
    """

    kv: str
    max_seqs: int
    max_depth: int
    quorum: float | str = AUTO
    lazy: bool = False
    decoder_attends: bool = True


class _Sequence:
    def __init__(self, prompt: int, exits: Sequence[int], policy: Policy) -> None:
        self.exits, self.policy = list(exits), policy
        self.prompt, self.end = prompt, prompt
        self.done = [0] * (policy.max_depth + 1)
        self.decoded = [0] * (policy.max_depth + 1)
        self.depth = 0
        self.takes_over = policy.kv == "last_exited"

    @property
    def prefilling(self) -> bool:
        return self.end == self.prompt

    @property
    def refined(self) -> bool:
        full = self.prefilling and not self.policy.lazy
        return self.depth == (self.policy.max_depth if full else self.exits[0])

    def deepen(self) -> int:
        """One pass: the number of rows it takes."""
        self.depth = deeper = self.depth + 1
        if self.takes_over and not self.prefilling:  # the prompt goes along where it has not been
            rows = max(self.prompt - self.done[deeper], 0) + 1
            self.done[deeper] = max(self.prompt, self.done[deeper])
            return rows
        rows = self.end - self.done[deeper]
        self.done[deeper] = self.end
        return rows

    def decode(self) -> int:
        """The boundary: rows through the decoder."""
        depth = self.exits.pop(0)
        if not self.policy.decoder_attends:
            rows = 1
        elif self.takes_over:
            rows = max(self.prompt - self.decoded[depth], 0) + (not self.prefilling)
        else:
            rows = self.end - self.decoded[depth]
        self.decoded[depth] = self.end
        self.end += 1
        self.depth = 0
        return rows


def simulate(
    costs: Costs, exits: Sequence[Sequence[int]], prompt: int, policy: Policy
) -> Simulated:
    """Requests with prompts of one length and given exit depths."""
    waiting = [_Sequence(prompt, depths, policy) for depths in exits][::-1]
    tokens = sum(map(len, exits))
    hazard = _hazard(exits, policy.max_depth)
    running: list[_Sequence] = []
    time, passes, rows = 0.0, 0, 0
    while waiting or running:
        while waiting and len(running) < policy.max_seqs:
            running.append(waiting.pop())
        idle = 0.0
        for _ in range(policy.max_depth):  # a step has no more passes than there are depths
            n = sum(s.deepen() for s in running if not s.refined)
            time += costs.c0 + costs.c1 * n
            passes, rows = passes + 1, rows + n
            ready = [s for s in running if s.refined]
            if not ready:
                continue
            if isinstance(policy.quorum, str):
                expected = sum(hazard[s.depth + 1] for s in running if not s.refined)
                one_more = costs.c0 * len(ready) / len(running)
                if one_more >= (costs.d0 + idle) / len(ready) * expected:
                    break
                idle += one_more
            elif len(ready) >= max(1, int(policy.quorum * len(running))):
                break
        if not (ready := [s for s in running if s.refined]):
            continue
        decoded = sum(s.decode() for s in ready)
        time += costs.d0 + costs.d1 * len(ready) + costs.d2 * decoded
        running = [s for s in running if s.exits]
    return Simulated(1e3 * tokens / time, passes / tokens, rows / passes)


def _hazard(exits: Sequence[Sequence[int]], max_depth: int) -> list[float]:
    """By depth: of the tokens that get there, the share that exits there."""
    depths = np.array([depth for one in exits for depth in one])
    found = [float((depths == d).sum() / max((depths >= d).sum(), 1)) for d in range(max_depth)]
    return [*found, 1.0]


def best(
    costs: Costs, exits: Sequence[Sequence[int]], prompt: int, policy: Policy
) -> tuple[Simulated, float]:
    """The best fixed quorum, whatever that of `policy`."""
    runs = [(simulate(costs, exits, prompt, replace(policy, quorum=q)), q) for q in QUORUMS]
    return max(runs, key=lambda run: run[0].rate)
