"""What passes and boundaries cost in a run, and what follows from that."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import numpy as np

from vllm_loopus.bench.models import ModelSize
from vllm_loopus.bench.policy import Costs, Policy, best, simulate
from vllm_loopus.bench.workers.probe import BOUNDARY, PASSES
from vllm_loopus.bench.workloads import Workload

Steps = Sequence[Mapping[str, Any]]  # `workers.probe.Step`, as JSON


def fit(steps: Steps) -> Costs:
    """Least squares over passes and over steps."""
    rows = np.array([n for step in steps for n in step["rows"]], dtype=float)
    seconds = np.array([t for step in steps for t in step["pass_seconds"]])
    c0, c1 = _fitted([np.ones_like(rows), rows], 1e3 * seconds)
    rest = np.array([step["seconds"] - sum(step["pass_seconds"]) for step in steps])
    tokens = np.array([step["tokens"] for step in steps], dtype=float)
    extra = np.array([step["decoder_rows"] for step in steps], dtype=float)
    d0, d1, d2 = _fitted([np.ones_like(tokens), tokens, extra], 1e3 * rest)
    return Costs(c0, c1, d0, d1, d2)


def _fitted(columns: list[Any], values: Any) -> list[float]:
    """Least squares without negative coefficients: a column whose coefficient is negative is
    omitted, its coefficient 0."""
    use = list(range(len(columns)))
    while True:
        found = np.linalg.lstsq(np.stack([columns[i] for i in use], 1), values, rcond=None)[0]
        if (found >= 0).all() or len(use) == 1:
            return [float(found[use.index(i)]) if i in use else 0.0 for i in range(len(columns))]
        use.pop(int(found.argmin()))


def counts(steps: Steps, tokens: int) -> dict[str, float]:
    """Passes and decoder rows per token, rows per pass."""
    passes = sum(len(step["rows"]) for step in steps)
    return {
        "passes": passes / tokens,
        "rows": sum(sum(step["rows"]) for step in steps) / max(passes, 1),
        "decoder_rows": sum(step["decoder_rows"] for step in steps) / tokens,
    }


def by_rows(steps: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Median milliseconds of a pass by its rows, and of the rest of a step by its tokens."""
    passes: dict[int, list[float]] = defaultdict(list)
    rests: dict[int, list[float]] = defaultdict(list)
    for step in steps:
        for rows, seconds in zip(step["rows"], step["pass_seconds"], strict=True):
            passes[rows].append(seconds)
        rests[step["tokens"]].append(step["seconds"] - sum(step["pass_seconds"]))
    return {
        name: [
            {"size": n, "ms": 1e3 * median(found[n]), "count": len(found[n])} for n in sorted(found)
        ]
        for name, found in (("passes", passes), ("boundaries", rests))
    }


def ideal_rate(costs: Costs, seqs: int, mean: float) -> float:
    """Tokens a second of mean-depth passes at full batch and one full boundary a token."""
    per_pass = costs.c0 + costs.c1 * seqs
    return 1e3 * seqs / (mean * per_pass + costs.d0 + (costs.d1 + costs.d2) * seqs)


def simulated(costs: Costs, workload: Workload, policy: Policy, full_depth: int) -> dict[str, Any]:
    """What the policy makes of the costs: at its best fixed quorum, and by the rule of `auto`."""
    exits, prompt = _replayed(workload)
    at_best, quorum = best(costs, exits, prompt, policy)
    by_rule = simulate(costs, exits, prompt, policy)
    fixed = [[full_depth] * len(depths) for depths in exits]
    off = simulate(costs, fixed, prompt, replace(policy, quorum=1.0, lazy=False))
    return {
        "rate": at_best.rate,
        "ratio": at_best.rate / off.rate,
        "quorum": quorum,
        "passes": at_best.passes,
        "rows": at_best.rows,
        "by_rule": asdict(by_rule),
    }


def simulated_rate(costs: Costs, workload: Workload, policy: Policy) -> float:
    """Tokens a second of the policy as it is."""
    return simulate(costs, *_replayed(workload), policy).rate


def _replayed(workload: Workload) -> tuple[list[list[int]], int]:
    """Exit depths of each request, and how long the prompts are: all the same."""
    (prompt,) = {len(request.prompt) for request in workload.requests}
    return [request.exits or [] for request in workload.requests], prompt


def add_limits(
    passes: Sequence[dict[str, float]], size: ModelSize, itemsize: int, machine: Mapping[str, Any]
) -> None:
    """Adds `ms_at_best` to passes by rows: the time of their weights through memory, or of their
    products at the best matrix rate that torch alone or any of these passes reached."""
    memory = size.reasoning_weights * itemsize / machine["bandwidth"]
    reached = [2 * row["size"] * size.reasoning_weights / (row["ms"] / 1e3) for row in passes]
    rate = max(*machine["matrix"].values(), *reached)
    for row in passes:
        products = 2 * row["size"] * size.reasoning_weights / rate
        row["ms_at_best"] = 1e3 * max(memory, products)


def shares(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Of a profile by part: shares of the time, greatest first, and those outside passes and
    boundaries together."""
    seconds = profile["seconds"]
    parts = {name: taken / seconds for name, taken in profile["parts"].items()}
    outside = sum(share for name, share in parts.items() if name not in (*PASSES, *BOUNDARY))
    ordered = dict(sorted(parts.items(), key=lambda part: -part[1]))
    return {"seconds": seconds, "parts": ordered, "outside_passes_and_boundaries": outside}
