"""Early exit on over off, off over a plain loop and the base; what ideal and simulation say."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vllm_loopus.bench.costs import counts, fit, ideal_rate, shares, simulated, simulated_rate
from vllm_loopus.bench.fleet import Cell, EngineSpec, Fleet, Timed
from vllm_loopus.bench.policy import Policy
from vllm_loopus.bench.ratios import Ratio
from vllm_loopus.bench.setup import Setup
from vllm_loopus.bench.workloads import Workload


def workload_of(setup: Setup, seqs: int) -> Workload:
    """The plan's requests for `seqs` sequences at a time, all there at once."""
    plan = setup.plan
    count = max(seqs, round(plan.waves * seqs))
    return setup.generator.decode(plan.seed + seqs, count, plan.prompt, plan.tokens)


def measure(setup: Setup, fleet: Fleet, seqs: int, seconds: float) -> dict[str, Any]:
    """With `seqs` sequences at a time. The fleet has `base`, `plain` and an engine a policy."""
    work = workload_of(setup, seqs)
    fixed = work.at_depth(setup.plan.model.max_loops)
    # What is compared stands side by side: on and off, off and the plain loop, which are closest.
    first, *others = setup.plan.policies
    cells = [
        Cell(f"{first} on", first, work),
        Cell(f"{first} off", first, fixed),
        Cell("base", "base", fixed.without_exits()),
        Cell("plain", "plain", fixed),
    ]
    for policy in others:
        cells += [Cell(f"{policy} off", policy, fixed), Cell(f"{policy} on", policy, work)]
    timed = fleet.rounds(cells, setup.plan.rounds, seconds)
    return {
        "seqs": seqs,
        "requests": len(work.requests),
        "tokens": work.tokens,
        "mean_depth": work.mean_depth,
        "rates": {name: found.rates for name, found in timed.items()},
        "off_over_base": _over_base(setup, timed),
        "policies": [
            {
                **compared(
                    work, policy, seqs, setup.plan.model.max_loops, timed[f"{policy} on"],
                    timed[f"{policy} off"], timed["plain"], lazy=True,
                    decoder_attends=setup.plan.model.decoder_attends,
                ),
                "profile": shares(fleet.profile(policy, work)),
            }
            for policy in setup.plan.policies
        ],
        "idle_engines_use": fleet.idle_share,
    }  # fmt: skip


def _over_base(setup: Setup, timed: Mapping[str, Timed]) -> dict[str, Any]:
    """Early exit off over what the base's throughput makes of the weights that a token meets."""
    model = setup.plan.model
    work = model.looped_weights(model.max_loops) / model.base_weights
    found = Ratio.over(timed[f"{setup.plan.policies[0]} off"].rates, timed["base"].rates)
    return {"work": work, "ratio": found.times(work).to_dict()}


def compared(
    work: Workload,
    policy: str,
    seqs: int,
    max_depth: int,
    on: Timed,
    off: Timed,
    plain: Timed | None,
    *,
    lazy: bool,
    decoder_attends: bool = True,
) -> dict[str, Any]:
    """Ratios, and what the simulated policy makes of the costs of the same run. `lazy`: prompts go
    no deeper than their first token. `decoder_attends`: whether the decoder has K/V. `peak_blocks`:
    K/V blocks."""
    costs = fit([*on.steps, *off.steps])
    ours = Policy(policy, seqs, max_depth, lazy=lazy, decoder_attends=decoder_attends)
    model = simulated(costs, work, ours, max_depth)
    chosen = replace(ours, quorum=model["quorum"])
    found = counts(on.steps, work.tokens * len(on.results))
    mean = work.mean_depth or max_depth
    # Round by round, by the costs of the round: a machine that slows down does so in both.
    simulated_rates, ideal_rates = [], []
    for one_on, one_off in zip(on.results, off.results, strict=True):
        of_round = fit([*one_on["steps"], *one_off["steps"]])
        simulated_rates.append(simulated_rate(of_round, work, chosen))
        ideal_rates.append(ideal_rate(of_round, seqs, mean))
    return {
        "policy": policy,
        "on_over_off": Ratio.over(on.rates, off.rates).to_dict(),
        "off_over_plain": plain and Ratio.over(off.rates, plain.rates).to_dict(),
        "of_simulated": Ratio.over(on.rates, simulated_rates).to_dict(),
        "of_ideal": Ratio.over(on.rates, ideal_rates).to_dict(),
        "of_ideal_full_batch": _full_batch_rate(on, seqs) / ideal_rate(costs, seqs, mean),
        "counts": found,
        "simulated": model,
        "explained": explained(found, model),
        "costs": asdict(costs),
        "peak_blocks": max(result["peak_blocks"] for result in on.results),
        "peak_blocks_off": max(result["peak_blocks"] for result in off.results),
    }


def _full_batch_rate(on: Timed, seqs: int) -> float:
    """Tokens a second while every slot has a sequence."""
    steps = [step for step in on.steps if step["running"] == seqs]
    seconds = sum(step["seconds"] for step in steps)
    return sum(step["tokens"] for step in steps) / seconds if seconds else float("nan")


def explained(found: Mapping[str, float], model: Mapping[str, Any]) -> str | None:
    """Why passes and rows are not within 10 % of the simulated ones; None where they are."""
    far = [n for n in ("passes", "rows") if not 0.9 <= found[n] / model[n] <= 1.1]
    if not far:
        return None
    rule = model["by_rule"]
    if all(0.9 <= found[n] / rule[n] <= 1.1 for n in far):
        return (
            f"the quorum: by the engine's rule the simulation has {rule['passes']:.3f} passes a "
            f"token of {rule['rows']:.1f} rows and {rule['rate'] / model['rate']:.3f} of the best "
            "fixed quorum's rate"
        )
    return f"{' and '.join(far)} differ, also from the simulation of the engine's own rule"


def specs(
    setup: Setup, looped: Path, base: Path, seqs: int, workloads: Sequence[Workload]
) -> list[EngineSpec]:
    """The engines that `measure` and the sections beside it use."""
    ours = [
        setup.engine(policy, "ours", looped, seqs, workloads, kv_policy=policy)
        for policy in setup.plan.policies
    ]
    own = [workload_of(setup, seqs)]
    return [
        setup.engine("base", "base", base, seqs, own),
        setup.engine("plain", "plain", looped, seqs, own),
        *ours,
    ]
