"""Seconds of a generated token at the full depth, with and without K/V caches, one sequence, by how
many tokens came before (the paper's figure 3 has them by the length of the answer)."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from vllm_loopus.bench.fleet import ENVIRONMENT, Fleet
from vllm_loopus.bench.process import Worker, package_worker
from vllm_loopus.bench.setup import Setup
from vllm_loopus.bench.workloads import Workload


def workload_of(setup: Setup, tokens: int) -> Workload:
    """One request of so many tokens at the full depth."""
    plan = setup.plan
    depth = plan.model.max_loops
    return setup.generator.decode(plan.seed, 1, plan.prompt, tokens).at_depth(depth)


def measure(setup: Setup, fleet: Fleet, looped: Path, base: Path) -> dict[str, Any]:
    """The last tokens of each length are timed, the ones before made up: what a token costs is a
    matter of how many came before. `ours` is our engine of the first policy, early exit off."""
    plan = setup.plan
    common = {"dtype": setup.dtype, "device": setup.device}
    sides = {
        name: Worker(
            f"transformers-{name}",
            package_worker("transformers_worker"),
            setup.folder / f"transformers-{name}.log",
            ENVIRONMENT,
        )
        for name in ("looped", "base")
    }
    try:
        about = sides["looped"].call("start", model=str(looped), **common)
        sides["base"].call("start", model=str(base), made_up=True, **common)
        rows = [_row(setup, fleet, sides, length) for length in plan.cache_lengths]
    finally:
        for worker in sides.values():
            worker.close()
    return {"about": about, "counted_tokens": plan.cache_counted, "lengths": rows}


def _row(setup: Setup, fleet: Fleet, sides: dict[str, Worker], length: int) -> dict[str, Any]:
    counted = min(setup.plan.cache_counted, length)
    # The tokens before the last ones are part of the prompt: their caches are filled in one go.
    request = workload_of(setup, length).requests[0]
    prompt = [*request.prompt, *request.prompt[-1:] * (length - counted)]
    work = setup.generator.decode(setup.plan.seed, 1, len(prompt), counted + 1)
    ours = work.at_depth(setup.plan.model.max_loops)
    looped, base = sides["looped"], sides["base"]
    # What follows the first token, which the prompt's passes are in.
    engines: dict[str, Callable[[], float]] = {
        "uncached": lambda: mean(
            looped.call("uncached", prompt=request.prompt, tokens=length, counted=counted)[
                "seconds"
            ]
        ),
        "cached": lambda: mean(
            looped.call("cached", prompts=[prompt], tokens=[counted + 1])["seconds"][1:]
        ),
        "ours": lambda: _after_first(fleet.run(setup.plan.policies[0], ours)),
        "base": lambda: base.call("base", prompts=[prompt], tokens=counted)["seconds"] / counted,
    }
    for measured in engines.values():  # a first call of a shape is slow
        measured()
    return {"length": length, **{name: measured() for name, measured in engines.items()}}


def _after_first(result: dict[str, Any]) -> float:
    """Seconds for each token after the first."""
    tokens = result["tokens"] - 1
    return float((result["whole"][0] - result["first_token"][0]) / tokens)
