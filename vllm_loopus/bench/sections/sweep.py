"""Throughput by batch and mean depth; costs of passes and boundaries by rows; how near to the
machine's limit a pass is."""

from collections.abc import Mapping
from typing import Any

from vllm_loopus.bench.costs import add_limits, by_rows
from vllm_loopus.bench.fleet import Cell, Fleet
from vllm_loopus.bench.setup import Setup
from vllm_loopus.bench.workloads import Workload


def batches(setup: Setup, seqs: int) -> list[int]:
    """The plan's batches that an engine of `seqs` sequences can run."""
    return [batch for batch in setup.plan.sweep_batches if batch <= seqs]


def workload_of(setup: Setup, batch: int, mean: float) -> Workload:
    """`batch` requests with exit depths of this mean."""
    plan = setup.plan
    work = setup.generator.decode(
        plan.seed + batch, batch, plan.prompt, plan.sweep_tokens, min(mean, plan.model.max_loops)
    )
    return work if mean < plan.model.max_loops else work.at_depth(plan.model.max_loops)


def measure(
    setup: Setup, fleet: Fleet, seqs: int, seconds: float, machine: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`machine`: its limits, where they were measured."""
    plan = setup.plan
    places = [
        (policy, batch, mean)
        for policy in plan.policies
        for batch in batches(setup, seqs)
        for mean in plan.sweep_means
    ]
    cells = [
        Cell(f"{policy} {batch} {mean}", policy, workload_of(setup, batch, mean))
        for policy, batch, mean in places
    ]
    timed = fleet.rounds(cells, 1, seconds, most=3)
    fixed = [
        step
        for (policy, _, mean), cell in zip(places, cells, strict=True)
        if policy == plan.policies[0] and mean >= plan.model.max_loops
        for step in timed[cell.name].steps
    ]
    costs = by_rows(fixed)
    if machine is not None:
        add_limits(costs["passes"], plan.model, setup.itemsize, machine)
    rows = [
        {
            "policy": policy,
            "batch": batch,
            "law_mean": mean,
            "mean_depth": cell.workload.mean_depth,
            "rates": timed[cell.name].rates,
        }
        for (policy, batch, mean), cell in zip(places, cells, strict=True)
    ]
    return {"throughput": rows, "costs": costs}
