"""A run: models written, engines started, sections measured, one JSON in the end."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from vllm_loopus.bench.fleet import Fleet
from vllm_loopus.bench.models import write_config, write_looped
from vllm_loopus.bench.sections import cache, decode, machine, mixed, quality, served, sweep, uneven
from vllm_loopus.bench.setup import Setup, about

FORMAT, VERSION = "vllm-loopus bench", 1
# Of the plan's time.
SHARES = {"decode": 0.5, "sweep": 0.15, "mixed": 0.25, "long": 0.1}
Section = Callable[[str, str], AbstractContextManager[None]]
WITH_FLEET = ("decode", "sweep", "mixed", "long", "cache")


def run(
    setup: Setup, command: Sequence[str], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The report as JSON. A section that fails is in `failed` with the reason; the others still
    run. After each section the report so far is given to `keep`."""
    plan = setup.plan
    report: dict[str, Any] = {"format": FORMAT, "version": VERSION, **about(setup, command)}
    report["failed"] = {}

    @contextmanager
    def section(name: str, what: str) -> Iterator[None]:
        """A failure affects this section only."""
        setup.tell(f"{name}: {what}")
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            report["failed"][name] = reason
            setup.tell(f"failed: {name}: {reason}")
        keep(report)

    begun = time.monotonic()
    setup.tell(f"{report['date']}  {report['machine']}  {setup.dtype}, plan {plan.name}")
    if "machine" in plan.sections:
        with section("machine", "memory bandwidth and matrix rate"):
            report["machine_limits"] = machine.measure(setup)
    looped, base = setup.folder / "looped", setup.folder / "base"
    threshold = write_looped(plan.model, looped, setup.dtype, plan.mean, plan.seed)
    write_config(plan.model.base_config(), base)
    report["threshold"] = threshold
    report["decode"] = []
    for seqs in plan.seqs:
        with section(f"engines with {seqs} sequences", "start"):
            _with_fleet(setup, seqs, looped, base, report, section)
    if "served" in plan.sections:
        with section("served", "vllm serve, and vllm bench serve as its client"):
            report["served"] = served.measure(setup, looped, threshold, _off_rate(report))
    if "uneven" in plan.sections:
        with section("uneven", "the head's own exits against cached generation"):
            report["uneven"] = uneven.measure(setup)
    if "quality" in plan.sections:
        with section("quality", "loopus-tiny by threshold"):
            report["quality"] = quality.measure(setup)
    report["seconds"] = time.monotonic() - begun
    return report


def _with_fleet(
    setup: Setup, seqs: int, looped: Path, base: Path, report: dict[str, Any], section: Section
) -> None:
    """The sections that run on engines of `seqs` sequences; those beside `decode` do so once, on
    the engines with the most sequences that the sweep's greatest batch allows."""
    plan = setup.plan
    beside = seqs == max(
        (n for n in plan.seqs if n <= max(plan.sweep_batches)), default=plan.seqs[0]
    )
    wanted = [n for n in plan.sections if n == "decode" or (beside and n in WITH_FLEET)]
    if not wanted:
        return
    works = [decode.workload_of(setup, seqs)]
    if "mixed" in wanted:
        works.append(mixed.mixed_workload(setup))
    if "long" in wanted:
        works.append(mixed.long_workload(setup))
    if "cache" in wanted:
        works.append(cache.workload_of(setup, max(plan.cache_lengths) + 2))
    with Fleet(decode.specs(setup, looped, base, seqs, works), setup.folder) as fleet:
        report["engines"] = {
            **report.get("engines", {}),
            str(seqs): {
                name: {**spec.to_dict(), **fleet.about[name]} for name, spec in fleet.specs.items()
            },
        }
        report["kv_bytes_a_token"] = fleet.about[plan.policies[0]]["kv_bytes"] | {
            "base": 2
            * plan.model.layers
            * plan.model.kv_heads
            * plan.model.head_size
            * setup.itemsize
        }
        fleet.warm_up(setup.generator.decode(plan.seed, seqs, plan.prompt, 2))
        if "decode" in wanted:
            with section("decode", f"{seqs} sequences"):
                seconds = setup.seconds(SHARES["decode"]) / len(plan.seqs)
                report["decode"].append(decode.measure(setup, fleet, seqs, seconds))
        if "sweep" in wanted:
            with section("sweep", "batches and mean depths"):
                seconds, limits = setup.seconds(SHARES["sweep"]), report.get("machine_limits")
                report["sweep"] = sweep.measure(setup, fleet, seqs, seconds, limits)
        for name, work in (("mixed", mixed.mixed_workload), ("long", mixed.long_workload)):
            if name in wanted:
                with section(name, "prefill included"):
                    seconds = setup.seconds(SHARES[name])
                    rounds = plan.rounds if name == "mixed" else 1  # long ones take minutes each
                    report[name] = mixed.measure(setup, fleet, work(setup), rounds, seconds)
        if "cache" in wanted:
            with section("cache", "seconds of a token by how many came before"):
                report["cache"] = cache.measure(setup, fleet, looped, base)


def _off_rate(report: dict[str, Any]) -> float:
    """Tokens a second with early exit off, of the largest batch."""
    if not report["decode"]:
        raise RuntimeError("the rate of requests follows from decode, which was not measured")
    policies = report["plan"]["policies"]
    return float(median(report["decode"][-1]["rates"][f"{policies[0]} off"]))
