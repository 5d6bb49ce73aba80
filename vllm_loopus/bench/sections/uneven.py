"""Requests of uneven length, all at once, exits by the head's own choice: ours (`exact`)
against the original implementation's cached generation, or a stand-in where there is no checkout.

In float32 on all sides: answers are held against the uncached forward.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from vllm_loopus.bench.fleet import ENVIRONMENT, Fleet, Timed
from vllm_loopus.bench.models import write_looped
from vllm_loopus.bench.process import Worker, package_worker, script_worker
from vllm_loopus.bench.ratios import Ratio
from vllm_loopus.bench.setup import Setup
from vllm_loopus.bench.workloads import Request

ORIGINAL, STAND_IN = "original", "stand-in: a cached loop of our own, no checkout was given"
CHECKED = 4  # requests whose answers the original's own uncached forward repeats, token by token
BATCHES = (16, 64)


def measure(setup: Setup) -> dict[str, Any]:
    plan = replace(setup.plan, size=setup.plan.uneven_size)
    setup = replace(setup, plan=plan, dtype="float32")
    folder = setup.folder / "uneven"
    threshold = write_looped(plan.model, folder, "float32", plan.mean, plan.seed)
    work = setup.generator.mixed(
        plan.seed, plan.uneven_requests, plan.uneven_prompt, plan.uneven_answer, load=1.0
    )
    work = replace(work, requests=[replace(r, arrival=0.0) for r in work.requests])
    work = work.without_exits(exit_threshold=threshold)
    engine = setup.engine("uneven", "ours", folder, min(64, plan.uneven_requests), [work])
    other = None if setup.original is None else _original(setup)
    reference = Worker(
        "reference", package_worker("transformers_worker"), setup.folder / "reference.log",
        ENVIRONMENT,
    )  # fmt: skip
    other = other or reference
    try:
        common = {"model": str(folder), "dtype": "float32", "device": setup.device}
        reference.call("start", **common)
        about = {} if other is reference else other.call("start", **common)
        with Fleet([engine], setup.folder) as fleet:
            fleet.warm_up(replace(work, requests=work.requests[:2]))
            sizes = sorted({min(b, plan.uneven_requests) for b in BATCHES})
            theirs = {n: [_in_batches(other, work.requests, n, threshold)] for n in sizes}
            best = max(theirs, key=lambda size: theirs[size][0]["rate"])
            ours = [fleet.run("uneven", work, answers=True)]
            for _ in range(1, plan.rounds):  # in turn, with the batches that suit the other most
                theirs[best].append(_in_batches(other, work.requests, best, threshold))
                ours.append(fleet.run("uneven", work, answers=True))
        checks = [
            reference.call("verify", prompt=r.prompt, answer=answer, threshold=threshold)
            for r, answer in zip(work.requests, ours[-1]["answers"], strict=True)
        ]
        by_original = _checked(
            other, work.requests, ours[-1]["answers"], threshold, other is reference
        )
    finally:
        reference.close()
        other.close()
    rates = Timed(ours).rates
    depths = Counter(str(depth) for check in checks for depth in check["exit_depths"])
    return {
        "against": STAND_IN if other is reference else ORIGINAL,
        "about": about,
        "model": plan.model.to_dict(),
        "requests": len(work.requests),
        "tokens": work.tokens,
        "threshold": threshold,
        "exit_depths": ours[-1]["exit_depths"],
        "rates": {"ours": rates}
        | {f"theirs, batches of {n}": [one["rate"] for one in theirs[n]] for n in sizes},
        "their_batches": {str(n): theirs[n][0] for n in sizes},
        "ours_over_theirs": Ratio.over(rates, [one["rate"] for one in theirs[best]]).to_dict(),
        "answers": {
            "tokens": sum(check["tokens"] for check in checks),
            "same_as_uncached": sum(check["same"] for check in checks),
            "different_and_sure": sum(check["different_and_sure"] for check in checks),
            "same_depths": depths == Counter(ours[-1]["exit_depths"]),
            "same_as_originals_uncached": by_original,
        },
    }  # fmt: skip


def _original(setup: Setup) -> Worker:
    assert setup.original is not None
    checkout, python = setup.original
    command = script_worker(python, "original_worker.py", str(checkout))
    # Its environment is its own.
    return Worker("original", command, setup.folder / "original.log", {"PYTHONPATH": ""})


def _in_batches(
    other: Worker, requests: Sequence[Request], size: int, threshold: float
) -> dict[str, float]:
    """Batches in the order of arrival, each as long as its longest. Tokens that were asked for."""
    seconds, depths = 0.0, []
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        found = other.call(
            "cached",
            prompts=[request.prompt for request in batch],
            tokens=[request.tokens for request in batch],
            threshold=threshold,
        )
        steps = found["seconds"]
        seconds += sum(steps) if isinstance(steps, list) else steps
        depths.append(found["mean_depth"] if "mean_depth" in found else mean(found["depths"]))
    tokens = sum(request.tokens for request in requests)
    return {"rate": tokens / seconds, "seconds": seconds, "mean_depth": mean(depths)}


def _checked(
    other: Worker,
    requests: Sequence[Request],
    answers: Sequence[list[int]],
    threshold: float,
    is_stand_in: bool,
) -> dict[str, int] | None:
    """Our answers against the original's uncached forward, the longest of them."""
    if is_stand_in:
        return None
    pairs = sorted(zip(requests, answers, strict=True), key=lambda pair: len(pair[1]))[-CHECKED:]
    found = [
        other.call("verify", prompt=request.prompt, answer=answer, threshold=threshold)
        for request, answer in pairs
    ]
    return {name: sum(check[name] for check in found) for name in ("tokens", "same")}
