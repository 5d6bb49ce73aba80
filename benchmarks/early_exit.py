"""How much faster is a batch with early exit on, and what does the loop cost with it off?

For developers who change a step, the scheduler or the quorum; the table of docs/early-exit.md, and
the costs that benchmarks/scale.py plans with.

    python benchmarks/early_exit.py      # batches of 4, 16 and 64: 25 minutes to hours on two cores
    python benchmarks/early_exit.py --size ouro --mean 2 --policies exact
    python benchmarks/early_exit.py --seqs 16 --tokens 24 --waves 2 --policies last_exited

Three engines, each in a process of its own, take turns of a second until all have finished the same
requests, so that a machine whose speed drifts slows all of them down: early exit on, early exit
off, and the model's own fixed loop under vLLM's own classes (plain). Exit depths are replayed from
a seeded truncated geometric law; prompts run to the full depth. The simulated policy
(`vllm_loopus/bench/policy.py`) gets the costs measured in the same run.
"""

import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from vllm_loopus.bench.costs import shares
from vllm_loopus.bench.fleet import Fleet, Timed
from vllm_loopus.bench.models import SIZES, write_looped
from vllm_loopus.bench.ratios import Ratio
from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.bench.sections.decode import compared, workload_of
from vllm_loopus.bench.setup import DTYPES, FULL, Setup, default_device, default_dtype
from vllm_loopus.serving.knobs.engine import KV_POLICIES


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seqs", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--policies", nargs="+", choices=KV_POLICIES, default=KV_POLICIES)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a request")
    parser.add_argument("--waves", type=float, default=4, help="requests for each sequence slot")
    parser.add_argument("--mean", type=float, default=3.0, help="mean exit depth")
    parser.add_argument("--quorum", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--no-plain", action="store_true", help="without the plain loop")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as the CPU likes it")
    parser.add_argument("--slice", type=float, default=1.0, help="seconds of a turn")
    parser.add_argument("--size", choices=SIZES, default="published")
    args = parser.parse_args()
    device = default_device()
    dtype = default_dtype(device) if args.dtype == "auto" else args.dtype
    plan = replace(
        FULL, size=args.size, tokens=args.tokens, waves=args.waves, mean=args.mean, sections=()
    )
    report = begin()
    print(f"{dtype}, {args.size} model\n")
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(plan, Path(folder), dtype, device, print)
        report |= {**setup.to_dict(), "runs": []}
        looped = setup.folder / "looped"
        write_looped(plan.model, looped, dtype, plan.mean)
        for seqs in args.seqs:
            for policy in args.policies:
                row = measure(setup, looped, seqs, policy, args)
                report["runs"].append(row)
                print(text_of(row), flush=True)
    finish(report, args.write)


def measure(setup: Setup, looped: Path, seqs: int, policy: str, args: Namespace) -> dict[str, Any]:
    """One policy at one number of sequences."""
    work = workload_of(setup, seqs)
    max_depth = setup.plan.model.max_loops
    fixed = work.at_depth(max_depth)
    quorum = args.quorum if args.quorum == "auto" else float(args.quorum)
    loopus = {"kv_policy": policy, "exit_quorum": quorum, "prefill_depth": "full"}
    specs = [setup.engine(name, "ours", looped, seqs, [work], **loopus) for name in ("off", "on")]
    workloads = {"off": fixed, "on": work}
    if not args.no_plain:
        specs.insert(0, setup.engine("plain", "plain", looped, seqs, [work]))
        workloads = {"plain": fixed, **workloads}
    timed = {name: Timed() for name in workloads}
    with Fleet(specs, setup.folder) as fleet:
        fleet.warm_up(setup.generator.decode(1, seqs, setup.plan.prompt, 2))
        for _ in range(args.repeats):
            for name, result in fleet.interleave(workloads, args.slice).items():
                timed[name].results.append(result)
        short = setup.generator.decode(2, seqs, setup.plan.prompt, 8)
        profiles = {
            "on": shares(fleet.profile("on", short)),
            "off": shares(fleet.profile("off", short.at_depth(max_depth))),
        }
        idle, engines = fleet.idle_share, fleet.about
    plain = timed.get("plain")
    row = compared(
        work, policy, seqs, max_depth, timed["on"], timed["off"], plain, lazy=False,
        decoder_attends=setup.plan.model.decoder_attends,
    )  # fmt: skip
    return {
        "seqs": seqs,
        "engines": engines,
        "rates": {name: found.rates for name, found in timed.items()},
        "profiles": profiles,
        "idle_engines_use": idle,
        **row,
    }


def text_of(row: dict[str, Any]) -> str:
    counts, costs, model = row["counts"], row["costs"], row["simulated"]
    plain = "" if row["off_over_plain"] is None else f"  off/plain {Ratio(**row['off_over_plain'])}"
    rule, parts = model["by_rule"], row["profiles"]["off"]["parts"]
    lines = [
        f"{row['policy']:<11} {row['seqs']:>3} sequences: {Ratio(**row['on_over_off'])}x  "
        f"(simulated {model['ratio']:.2f}x at quorum {model['quorum']:g}; "
        f"tokens/s {median(row['rates']['on']):.2f} = {Ratio(**row['of_simulated'])} of simulated, "
        f"{row['of_ideal_full_batch']:.2f} of ideal while all slots are in use){plain}",
        f"passes/token {counts['passes']:.3f} (simulated {model['passes']:.3f}, by the engine's "
        f"rule {rule['passes']:.3f})  rows/pass {counts['rows']:.1f} "
        f"(simulated {model['rows']:.1f}, by the rule {rule['rows']:.1f})  "
        f"decoder rows/token {counts['decoder_rows']:.2f}",
        f"costs, ms: pass {costs['c0']:.1f} + {costs['c1']:.2f} rows, boundary {costs['d0']:.1f} + "
        f"{costs['d1']:.2f} tokens + {costs['d2']:.2f} decoder rows",
        "early exit off, time by part: "
        + ", ".join(f"{name} {100 * share:.1f} %" for name, share in parts.items()),
        f"engines that waited for their turn used {row['idle_engines_use']:.4f} of a core each",
    ]
    if row["explained"]:
        lines.append(row["explained"])
    return "\n    ".join(lines)


if __name__ == "__main__":
    main()
