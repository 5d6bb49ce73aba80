"""Capacity of many replicas: requests a second and latency, in closed form and by simulation.

    python benchmarks/scale.py                                   # a table: 1 to 4096 replicas
    python benchmarks/scale.py --rate 2000 --p95 30              # how many replicas that takes
    python benchmarks/scale.py --costs early_exit.json           # measured costs
    python benchmarks/scale.py --picture docs/scale.png

A replica serves up to M requests at once. A pass moves each of them one depth on and takes

    P(n) = c0 + d0 + (c1 + (d1 + d2) / D) n    milliseconds,

with `policy.Costs` and D the mean depth of a token: of n rows in a pass, n / D end a token. A
request of T tokens that leave at depth d needs T d passes, and all in flight advance together: a
processor-sharing queue whose speed depends on n. Prompts of p tokens take their share of the
machine, rate x E[p d] x c1 / 1000 with the mean over requests, and slow the passes by as much.
Above M requests wait, first come first served. The parts are in `docs/scale.md`.
"""

import argparse
import heapq
import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_loopus.bench.policy import Costs

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
        """Requests a second that leave, with n there."""
        busy = min(n, self.seqs)
        return 1e3 * busy / (load.passes * self.pass_ms(busy, load, rate)) if n else 0.0

    def capacity(self, load: Load) -> float:
        """The most requests a second: where what leaves with M there is what comes."""
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
    gives each. The birth-death chain with `service_rate`; exact below M whatever the distribution
    of passes (processor sharing), and for exponential ones above.
    """
    if rate >= replica.capacity(load):
        return math.inf, 1.0
    weights, n = [1.0], 0
    while n < replica.seqs:
        n += 1
        weights.append(weights[-1] * rate / replica.service_rate(n, load, rate))
    ratio = rate / replica.service_rate(n, load, rate)
    tail = weights[-1] * ratio / (1 - ratio)  # all states above M
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
    the beginning, so that one leaves when it reaches the `progress` it had plus what it needs."""

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
    passes: np.ndarray | None = None,
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


def _draw(rng: np.random.Generator, load: Load, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Passes and budgets of requests."""
    needed, budgets = np.zeros(len(kinds)), np.zeros(len(kinds))
    for index, kind in enumerate(load.kinds):
        of_kind = kinds == index
        p = _geometric(kind.tokens, kind.max_tokens)
        tokens = np.minimum(rng.geometric(p, of_kind.sum()), kind.max_tokens)
        needed[of_kind] = tokens * kind.depth
        budgets[of_kind] = kind.budget
    return needed, budgets


def _geometric(mean: float, limit: int) -> float:
    """The parameter of a geometric law that, cut at `limit`, has this mean."""
    low, high = 1e-9, 1.0
    for _ in range(100):
        p = (low + high) / 2
        low, high = (p, high) if (1 - (1 - p) ** limit) / p > mean else (low, p)
    return high


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


def table(
    replica: Replica, load: Load, share: float, sizes: Sequence[int], requests: int
) -> list[dict[str, Any]]:
    """Closed form and simulation at `share` of the capacity, for numbers of replicas."""
    rate = share * replica.capacity(load)
    even = balanced(replica, load, rate)
    rows = []
    for replicas in sizes:
        row: dict[str, Any] = {
            "replicas": replicas,
            "gpus": replicas * replica.gpus,
            "rate": rate * replicas,
            "closed": {
                "random": alone(replica, load, rate)[0],
                **dict.fromkeys(POLICIES[1:], even),
            },
        }
        for policy in POLICIES:
            found = simulate(replica, load, rate * replicas, replicas, policy, requests)
            row[policy] = vars(found)
        rows.append(row)
    return rows


def read_costs(file: Path) -> Costs:
    """`{"c0": ...}`, or what `early_exit.py --write` left: the costs of its last run with any.

    Raises `ValueError` for a file with neither.
    """
    content = json.loads(file.read_text())
    if isinstance(content, dict) and "runs" in content:
        content = next((r["costs"] for r in reversed(content["runs"]) if r.get("costs")), None)
    try:
        return Costs(**content)
    except TypeError as error:
        raise ValueError(f"{file} has no costs c0, c1, d0, d1, d2") from error


def draw(replica: Replica, load: Load, replicas: int, requests: int, file: Path) -> None:
    """Latency over the rate, by policy, closed forms as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    capacity = replica.capacity(load)
    shares = np.array([0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    fine = np.linspace(0.1, 0.97, 80)
    rates = fine * capacity * replicas
    axes[0].plot(rates, [alone(replica, load, s * capacity)[0] for s in fine], "C0", lw=1)
    axes[0].plot(rates, [balanced(replica, load, s * capacity) for s in fine], "k", lw=1)
    for color, policy in enumerate(POLICIES):
        found = [
            simulate(replica, load, s * capacity * replicas, replicas, policy, requests)
            for s in shares
        ]
        at = shares * capacity * replicas
        for axis, name in zip(axes, ("mean", "p95"), strict=True):
            axis.plot(at, [getattr(o, name) for o in found], f"C{color}o", ms=4, label=policy)
            if name == "p95":
                axis.plot(at, [getattr(o, name) for o in found], f"C{color}", lw=1)
    for axis, title in zip(
        axes,
        ("mean (lines: closed form, random and balanced)", "95 % of the requests within"),
        strict=True,
    ):
        axis.set(title=title, xlabel=f"requests a second, {replicas} replicas", ylabel="s", ylim=0)
        axis.grid(alpha=0.3)
    top = 2 * alone(replica, load, 0.8 * capacity)[0]
    axes[0].set_ylim(0, top)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


# A 4B model decoding on an H200-like device: assumed, not measured (see docs/scale.md).
ASSUMED = Costs(c0=1.6, c1=0.008, d0=0.35, d1=0.002, d2=0.0)
MIXED = Load(
    (
        Kind(0.7, max_loops=2, depth=1.5, max_tokens=256, tokens=100, prompt=500),
        Kind(0.3, max_loops=8, depth=4.0, max_tokens=1024, tokens=400, prompt=500),
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--costs", type=Path, help="JSON: costs, or a report of early_exit.py")
    parser.add_argument("--kinds", type=Path, help="JSON: a list of kinds of requests (`Kind`)")
    parser.add_argument("--seqs", type=int, default=64, help="requests at once on a replica")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a replica")
    parser.add_argument("--share", type=float, default=0.8, help="of the capacity")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--rate", type=float, help="requests a second to plan for")
    parser.add_argument("--p95", type=float, default=30.0, help="seconds, with --rate")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--write", type=Path, help="JSON")
    args = parser.parse_args()
    costs = read_costs(args.costs) if args.costs else ASSUMED
    load = MIXED
    if args.kinds:
        load = Load(tuple(Kind(**kind) for kind in json.loads(args.kinds.read_text())))
    total = load.mean(lambda _: 1.0)
    if not math.isclose(total, 1.0):
        parser.error(f"shares of --kinds add up to {total}, not to 1")
    replica = Replica(costs, args.seqs, args.gpus)
    capacity = replica.capacity(load)
    report: dict[str, Any] = {
        "costs": vars(costs) if args.costs else {**vars(costs), "assumed": True},
        "capacity_of_a_replica": capacity,
        "passes_of_a_request": load.passes,
        "depth_of_a_token": load.depth,
    }
    print(
        f"costs, ms: {costs}{'' if args.costs else ' (assumed)'}\n"
        f"a request: {load.passes:.0f} passes, mean depth {load.depth:.2f}; a replica: at most "
        f"{capacity:.2f} requests/s, {args.seqs} at once\n"
    )
    if args.rate is not None:
        for policy in POLICIES:
            found = replicas_for(replica, load, args.rate, args.p95, policy, args.requests)
            report[policy] = found
            told = f"{found} replicas, {found * args.gpus} GPUs" if found else "no number"
            print(f"{args.rate:g} requests/s, 95 % within {args.p95:g} s, {policy}: {told}")
    else:
        report["table"] = table(replica, load, args.share, args.replicas, args.requests)
        print(
            f"latency in s at {args.share:.0%} of the capacity: mean (closed form), p50 / p95 / p99"
        )
        for row in report["table"]:
            cells = [
                f"{policy} {row[policy]['mean']:.2f} ({row['closed'][policy]:.2f}), "
                + " / ".join(f"{row[policy][name]:.2f}" for name in ("p50", "p95", "p99"))
                for policy in POLICIES
            ]
            print(f"{row['gpus']:>6} GPUs {row['rate']:>9.1f} req/s | " + " | ".join(cells))
    if args.picture:
        draw(replica, load, 64, args.requests, args.picture)
    if args.write:
        args.write.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
