"""How many replicas does a load take, and at what latency? Up to thousands of them.

For whoever plans capacity, or changes the router of `vllm_loopus/deploy/`; docs/scale.md has the
numbers and says what the model omits.

    python benchmarks/scale.py                          # 1 to 4096 replicas: four minutes
    python benchmarks/scale.py --rate 2000 --p95 30     # how many replicas that takes
    python benchmarks/scale.py --costs early_exit.json  # measured costs
    python benchmarks/scale.py --seqs 8 --picture docs/scale.png

In closed form and by simulation; the model is in `replicas.py`. No model is run.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from replicas import (  # beside this file
    POLICIES,
    Kind,
    Load,
    Replica,
    alone,
    balanced,
    replicas_for,
    simulate,
)

from vllm_loopus.bench.policy import Costs
from vllm_loopus.bench.script import begin, finish, script_parser


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
    """`{"c0": ...}`, or what `early_exit.py --write` wrote: the costs of its last run with any.

    Raises `OSError`, and `ValueError` for a file with neither.
    """
    content = _json(file)
    if isinstance(content, dict) and "runs" in content:
        content = next((r["costs"] for r in reversed(content["runs"]) if r.get("costs")), None)
    try:
        return Costs(**content)
    except TypeError as error:
        raise ValueError(f"{file} has no costs c0, c1, d0, d1, d2") from error


def read_load(file: Path) -> Load:
    """A JSON list of kinds of requests. Raises `OSError`, and `ValueError` for another file."""
    try:
        load = Load(tuple(Kind(**kind) for kind in _json(file)))
    except TypeError as error:
        raise ValueError(f"{file} is not a list of kinds of requests: {error}") from error
    if not math.isclose(total := load.mean(lambda _: 1.0), 1.0):
        raise ValueError(f"shares of {file} add up to {total}, not to 1")
    return load


def _json(file: Path) -> Any:
    """Raises `OSError`, and `ValueError` naming the file."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def draw(replica: Replica, load: Load, replicas: int, requests: int, file: Path) -> None:
    """Latency over the rate, by policy, closed forms as lines."""
    from matplotlib.figure import Figure

    capacity = replica.capacity(load)
    shares = np.array([0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2, sharex=True)
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
    parser = script_parser(__doc__)
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
    args = parser.parse_args()
    try:
        costs = read_costs(args.costs) if args.costs else ASSUMED
        load = read_load(args.kinds) if args.kinds else MIXED
    except (OSError, ValueError) as error:
        parser.error(str(error))
    replica = Replica(costs, args.seqs, args.gpus)
    capacity = replica.capacity(load)
    report = {
        **begin(),
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
    finish(report, args.write)


if __name__ == "__main__":
    main()
