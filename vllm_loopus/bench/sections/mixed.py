"""Prefill included: long-tailed prompts and answers that arrive at random, and long contexts.

Prompts go as deep as their first token exits (`prefill_depth` `lazy`, the default).
"""

from typing import Any

import numpy as np

from vllm_loopus.bench.fleet import Cell, Fleet, Timed
from vllm_loopus.bench.ratios import Ratio
from vllm_loopus.bench.setup import Setup
from vllm_loopus.bench.workloads import Workload

LOAD = 3.0  # arrivals for each request that an engine with early exit off can finish
PERCENTILES = (50, 90, 99)


def mixed_workload(setup: Setup) -> Workload:
    """Long-tailed prompts and answers, Poisson arrivals."""
    plan = setup.plan
    return setup.generator.mixed(
        plan.seed, plan.mixed_requests, plan.mixed_prompt, plan.mixed_answer, LOAD
    )


def long_workload(setup: Setup) -> Workload:
    """Long contexts, all there at once."""
    plan = setup.plan
    shortest, longest = plan.long_context
    return setup.generator.long(plan.seed, plan.long_requests, shortest, longest, plan.mixed_answer)


def measure(
    setup: Setup, fleet: Fleet, work: Workload, rounds: int, seconds: float
) -> dict[str, Any]:
    """Early exit on over off. What arrives over time does so faster than it can be served: the rate
    follows from how long the first engine takes with early exit off."""
    fixed = work.at_depth(setup.plan.model.max_loops)
    gap = 0.0
    if any(request.arrival for request in work.requests):
        alone = fleet.run(setup.plan.policies[0], fixed)
        gap = alone["seconds"] / len(work.requests)
    cells = [
        Cell(f"{policy} {state}", policy, requests)
        for policy in setup.plan.policies
        for state, requests in (("off", fixed), ("on", work))
    ]
    timed = fleet.rounds(cells, rounds, seconds, gap=gap)
    return {
        "requests": len(work.requests),
        "prompt_tokens": sum(len(request.prompt) for request in work.requests),
        "tokens": work.tokens,
        "mean_depth": work.mean_depth,
        "seconds_between_arrivals": gap / LOAD,
        "policies": [
            {
                "policy": policy,
                "on_over_off": Ratio.over(
                    timed[f"{policy} on"].rates, timed[f"{policy} off"].rates
                ).to_dict(),
                "first_token": _latency(timed, policy, "first_token"),
                "whole": _latency(timed, policy, "whole"),
            }
            for policy in setup.plan.policies
        ],
    }


def _latency(timed: dict[str, Timed], policy: str, what: str) -> dict[str, dict[str, float]]:
    """Percentiles in seconds, with early exit off and on."""
    found = {}
    for state in ("off", "on"):
        values = [v for result in timed[f"{policy} {state}"].results for v in result[what]]
        found[state] = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return found
