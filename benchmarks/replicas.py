"""The model of `scale.py`: replicas that serve requests in passes, in closed form and simulated.

A replica serves up to M requests at once. A pass moves each of them one depth on and takes

    P(n) = c0 + d0 + (c1 + (d1 + d2) / D) n    milliseconds,

with `policy.Costs` and D the mean depth of a token: of n rows in a pass, n / D end a token. A
request of T tokens that exit at depth d needs T d passes, and all in flight advance together: a
processor-sharing queue whose speed depends on n. Prompts of p tokens take their share of the
machine, rate x E[p d] x c1 / 1000 with the mean over requests, and slow the passes by as much.
Requests beyond M wait, first come first served. The parts are in `docs/scale.md`.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_loopus.bench.policy import Costs, geometric_parameter

POLICIES = ("random", "requests", "budget")  # to whom; the latter two: least outstanding


@dataclass(frozen=True)
class Kind:
    """A kind of request: its `share` of all, its budget (`max_loops`, `max_tokens`), and what it
    takes of it: `depth` passes a token, `tokens` on average, geometric and cut at `max_tokens`."""

    share: float
    max_loops: int
    depth: float
    max_tokens: int
    tokens: float
    prompt: int = 0

    @property
    def budget(self) -> float:
        return float(self.max_loops * self.max_tokens)


@dataclass(frozen=True)
class Load:
    """Kinds of requests, their shares adding up to 1."""

    kinds: tuple[Kind, ...]

    def mean(self, value: Callable[[Kind], float]) -> float:
        return sum(kind.share * value(kind) for kind in self.kinds)

    @property
    def passes(self) -> float:
        """Of a request, on average."""
        return self.mean(lambda kind: kind.tokens * kind.depth)

    @property
    def depth(self) -> float:
        """Of a token, on average."""
        return self.passes / self.mean(lambda kind: kind.tokens)


@dataclass(frozen=True)
class Replica:
    """`seqs`: requests at once (M). `gpus`: that it stands on."""

    costs: Costs
    seqs: int
    gpus: int = 1

    def pass_ms(self, n: int, load: Load, rate: float) -> float:
        """Milliseconds of a pass over n rows, at `rate` requests a second; infinite when prompts
        alone are too much."""
        c = self.costs
        prompts = rate / 1e3 * load.mean(lambda kind: kind.prompt * kind.depth) * c.c1
        if prompts >= 1:
            return math.inf
        return (c.c0 + c.d0 + (c.c1 + (c.d1 + c.d2) / load.depth) * n) / (1 - prompts)

    def service_rate(self, n: int, load: Load, rate: float) -> float:
        """Requests a second that end, with n there."""
        busy = min(n, self.seqs)
        return 1e3 * busy / (load.passes * self.pass_ms(busy, load, rate)) if n else 0.0

    def capacity(self, load: Load) -> float:
        """The most requests a second: as many come as end with M there."""
        low, high = 0.0, self.service_rate(self.seqs, load, 0.0)
        for _ in range(60):
            middle = (low + high) / 2
            enough = self.service_rate(self.seqs, load, middle) > middle
            low, high = (middle, high) if enough else (low, middle)
        return low


@dataclass(frozen=True)
class Outcome:
    """Latencies in seconds; `busy`: requests in flight over M, on average."""

    mean: float
    p50: float
    p95: float
    p99: float
    busy: float


def alone(replica: Replica, load: Load, rate: float) -> tuple[float, float]:
    """Mean latency in seconds and `busy` of one replica with Poisson arrivals: what random routing
    gives each. The birth-death chain with `service_rate`: exact up to M requests whatever the
    distribution of passes (processor sharing), beyond M for exponential ones.
    """
    if rate >= replica.capacity(load):
        return math.inf, 1.0
    weights, n = [1.0], 0
    while n < replica.seqs:
        n += 1
        weights.append(weights[-1] * rate / replica.service_rate(n, load, rate))
    ratio = rate / replica.service_rate(n, load, rate)
    tail = weights[-1] * ratio / (1 - ratio)  # all states beyond M
    total = sum(weights) + tail
    inside = sum(k * weight for k, weight in enumerate(weights))
    waiting = tail * (n + 1 / (1 - ratio))
    busy = (inside + tail * n) / total / replica.seqs
    return (inside + waiting) / total / rate, busy


def balanced(replica: Replica, load: Load, rate: float) -> float:
    """Mean latency in seconds where each replica always has the same number: the limit of balanced
    routing over many replicas. `rate` is one replica's."""
    if rate >= replica.capacity(load):
        return math.inf
    low, high = 0.0, float(replica.seqs)
    for _ in range(60):
        n = (low + high) / 2
        passes = replica.pass_ms(1, load, rate), replica.pass_ms(2, load, rate)
        each = passes[0] + (n - 1) * (passes[1] - passes[0])
        low, high = (n, high) if 1e3 * n < rate * load.passes * each else (low, n)
    return low / rate


class _Server:
    """One replica in the simulation: `progress` is the passes each request in flight has had since
    the beginning, so that one ends at the `progress` it had when it came plus what it needs."""

    def __init__(self) -> None:
        self.progress, self.since, self.version = 0.0, 0.0, 0
        self.flying: list[tuple[float, int]] = []
        self.waiting: deque[int] = deque()


def simulate(
    replica: Replica,
    load: Load,
    rate: float,
    replicas: int,
    policy: str,
    requests: int = 100_000,
    seed: int = 0,
    passes: NDArray[np.float64] | None = None,
) -> Outcome:
    """Poisson arrivals of `rate` a second over all replicas.

    `requests` are counted, after those that fill the replicas and before some that keep them full:
    as many as come while the longest request takes, and a tenth at least. `passes` gives the passes
    of requests, in turn, instead of drawing tokens.
    """
    rng = np.random.default_rng(seed)
    pass_ms = [replica.pass_ms(n, load, rate / replicas) for n in range(replica.seqs + 1)]
    longest = max(kind.max_tokens * kind.depth for kind in load.kinds)
    if passes is not None:
        longest = float(np.quantile(passes, 0.999))
    first = max(math.ceil(longest * pass_ms[-1] * rate / 1e3), requests // 10)
    end, total = first + requests, 2 * first + requests
    arrivals = np.cumsum(rng.exponential(1e3 / rate, total))
    kinds = rng.choice(len(load.kinds), total, p=[kind.share for kind in load.kinds])
    needed, budgets = _draw(rng, load, kinds)
    if passes is not None:
        needed = np.resize(passes, total)
    servers = [_Server() for _ in range(replicas)]
    counts, owed = np.zeros(replicas, int), np.zeros(replicas)
    ends = np.zeros(total)
    events: list[tuple[float, int, int]] = []  # when, server, its version
    held, last = 0.0, 0.0

    def advance(server: _Server, now: float) -> None:
        if server.flying:
            server.progress += (now - server.since) / pass_ms[len(server.flying)]
        server.since = now

    def admit(server: _Server) -> None:
        while server.waiting and len(server.flying) < replica.seqs:
            one = server.waiting.popleft()
            heapq.heappush(server.flying, (server.progress + needed[one], one))

    def plan(place: int) -> None:
        server = servers[place]
        server.version += 1
        if server.flying:
            left = max(server.flying[0][0] - server.progress, 0.0)
            when = server.since + left * pass_ms[len(server.flying)]
            heapq.heappush(events, (when, place, server.version))

    choices = rng.integers(replicas, size=total) if policy == "random" else None
    flying_now, coming, unanswered = 0, 0, requests
    while unanswered:
        arrives = coming < total and (not events or arrivals[coming] <= events[0][0])
        if arrives:
            now = float(arrivals[coming])
            if choices is not None:
                place = int(choices[coming])
            else:
                place = int(np.argmin(counts if policy == "requests" else owed))
        else:
            now, place, version = heapq.heappop(events)
            if version != servers[place].version:
                continue
        server = servers[place]
        if first <= coming < end:
            held += flying_now * (now - last)
        last = now
        before = len(server.flying)
        advance(server, now)
        if arrives:
            counts[place] += 1
            owed[place] += budgets[coming]
            server.waiting.append(coming)
            coming += 1
        else:
            _, one = heapq.heappop(server.flying)
            ends[one] = now
            unanswered -= first <= one < end
            counts[place] -= 1
            owed[place] -= budgets[one]
        admit(server)
        flying_now += len(server.flying) - before
        plan(place)
    latencies = (ends - arrivals)[first:end] / 1e3
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99))
    span = float(arrivals[end] - arrivals[first])
    busy = held / span / replicas / replica.seqs
    return Outcome(float(latencies.mean()), float(p50), float(p95), float(p99), float(busy))


def _draw(
    rng: np.random.Generator, load: Load, kinds: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Passes and budgets of requests."""
    needed, budgets = np.zeros(len(kinds)), np.zeros(len(kinds))
    for index, kind in enumerate(load.kinds):
        of_kind = kinds == index
        p = geometric_parameter(kind.tokens, kind.max_tokens)
        tokens = np.minimum(rng.geometric(p, of_kind.sum()), kind.max_tokens)
        needed[of_kind] = tokens * kind.depth
        budgets[of_kind] = kind.budget
    return needed, budgets


def replicas_for(
    replica: Replica, load: Load, rate: float, p95: float, policy: str, requests: int
) -> int | None:
    """The fewest replicas that keep 95 % of the requests within `p95` seconds, by simulation; None
    when no number does."""
    low = max(1, math.ceil(rate / replica.capacity(load)))
    high = low

    def meets(replicas: int) -> bool:
        return (
            rate / replicas < replica.capacity(load)
            and simulate(replica, load, rate, replicas, policy, requests).p95 <= p95
        )

    while not meets(high):
        low, high = high + 1, 2 * high
        if high > 1000 * rate / replica.capacity(load) + 1000:
            return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return low
