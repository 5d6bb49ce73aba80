"""How much of a fast device's time is used, and what is lost to the host?

For developers who change the scheduler, the worker or the step; no GPU is needed.

    python benchmarks/host.py            # the table of docs/gpu.md: five minutes on two cores
    python benchmarks/host.py --seqs 64 --policy exact --json --pass-ms 2.2 --boundary-ms 0.8
    python benchmarks/host.py --seqs 64 --policy exact --model qwen3-1.7b --card h100 --parts

The real engine runs over an emulated device (`benchmarks/emulated.py`). `of_device` is the share of
the time in which the device is busy, `device_only` what the same calls give back to back, and
`simulated` what the best simulated policy gives with the same costs and no host at all
(`vllm_loopus/bench/policy.py`). Exit depths are replayed from a seeded truncated geometric law, so
the confidence head costs nothing here.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from emulated import Device, Times, install, watch_parts  # beside this file

from vllm_loopus.bench.models import ModelSize, write_config
from vllm_loopus.bench.policy import Costs, Policy, best
from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.bench.waves import simulate_waves
from vllm_loopus.bench.workers.probe import PartTimer
from vllm_loopus.bench.workloads import Generator

MAX_LOOPS, MEAN, PROMPT = 8, 3.0, 4
POLICIES = ("off", "exact", "last_exited")
SMALL, LARGE = (0.83, 4.0, 0.3), (2.2, 4.0, 0.8)  # about 1.7B and 4B parameters on an H100
TABLE = [
    *((1, policy, LARGE) for policy in ("off", "exact")),
    *((seqs, policy, LARGE) for seqs in (16, 64) for policy in POLICIES),
    *((256, policy, LARGE) for policy in ("off", "exact")),
    *((seqs, policy, SMALL) for seqs in (16, 64) for policy in ("off", "exact")),
]
# Memory bytes and bf16 operations a second; half of either is reached.
CARDS = {"a100": (2.0e12, 312e12), "h100": (3.35e12, 989e12), "h200": (4.8e12, 989e12)}
MODELS = {
    "qwen3-0.6b": ModelSize(28, 1024, 3072, 16, 8, 128, 151936),
    "qwen3-1.7b": ModelSize(28, 2048, 6144, 16, 8, 128, 151936),
    "qwen3-4b": ModelSize(36, 2560, 9728, 32, 8, 128, 151936),
    "qwen3-8b": ModelSize(36, 4096, 12288, 32, 8, 128, 151936),
}
WAVES = [(depth, ahead) for depth in (1, 2, 3) for ahead in (1, 2, 3, 5, 7)]  # of the simulation
THIN = ModelSize(3, 64, 64, 1, 1, 64, 512, MAX_LOOPS)  # what computes is emulated
LOOPED = 0.5  # of the layers; encoder and decoder have the others


def roofline(model: str, card: str) -> tuple[float, float, float]:
    """Milliseconds a pass, microseconds a row of it, milliseconds a boundary: weights are read once
    a call; a row costs its operations."""
    size, (bandwidth, operations) = MODELS[model], CARDS[card]
    looped = LOOPED * size.layers * size.layer_weights
    others = size.base_weights - looped
    row = 2 * looped / (0.5 * operations)
    return 2e3 * looped / (0.5 * bandwidth), 1e6 * row, 2e3 * others / (0.5 * bandwidth)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seqs", type=int, help="one measurement instead of the table")
    parser.add_argument("--policy", choices=POLICIES, default="exact")
    parser.add_argument("--pass-ms", type=float, default=LARGE[0])
    parser.add_argument("--row-us", type=float, default=LARGE[1])
    parser.add_argument("--boundary-ms", type=float, default=LARGE[2])
    parser.add_argument("--model", choices=MODELS, help="costs by roofline; needs --card")
    parser.add_argument("--card", choices=CARDS)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a request")
    parser.add_argument("--waves", type=float, default=2, help="requests for each sequence slot")
    parser.add_argument("--overlap", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--late-verdicts", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--speculate", default="off", help="auto, or DRAFT_DEPTH,LOOKAHEAD")
    parser.add_argument("--acceptance", type=float, default=0.9, help="of guesses, replayed")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--parts", action="store_true", help="host time by part")
    args = parser.parse_args()
    if bool(args.model) != bool(args.card):
        parser.error("--model and --card go together")
    if args.model:
        args.pass_ms, args.row_us, args.boundary_ms = roofline(args.model, args.card)
    if args.json:
        print(json.dumps(measure(args)))
        return
    report = begin()
    if args.seqs is None:
        report["rows"] = table()
    else:
        report |= measure(args)
        print(text_of(report))
    finish(report, args.write)


def measure(args: Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    for name, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("OMP_NUM_THREADS", "1"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(name, value)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm import LLM, SamplingParams

    device = Device(Times(args.pass_ms / 1e3, args.row_us / 1e6, args.boundary_ms / 1e3))
    install(device)
    parts = PartTimer()
    if args.parts:
        watch_parts(parts)
    on = args.policy != "off"
    loopus: dict[str, Any] = {
        "kv_policy": args.policy if on else "exact",
        "overlap": args.overlap,
        "late_verdicts": args.late_verdicts,
    }
    wave = [int(part) for part in args.speculate.split(",")] if "," in args.speculate else None
    names = "draft_depth", "lookahead"
    loopus["speculate"] = dict(zip(names, wave, strict=True)) if wave else args.speculate
    count = round(args.waves * args.seqs)
    generator = Generator(THIN.vocabulary, MAX_LOOPS, MEAN if on else MAX_LOOPS)
    rng = np.random.default_rng(11)
    depths = [generator.independent_exits(rng, args.tokens) for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            str(write_config(THIN.config(), Path(folder) / "thin")),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=args.seqs,
            enforce_eager=True,
            kv_cache_memory_bytes=3 << 30,
            additional_config={"loopus": loopus},
        )
    right = [(rng.random(args.tokens) < args.acceptance).astype(int).tolist() for _ in depths]
    prompts: list[Any] = [{"prompt_token_ids": generator.prompt(rng, PROMPT)} for _ in range(count)]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=args.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={
                **({"exit_depths": one} if on else {}),
                **({"guesses": guesses} if args.speculate != "off" else {}),
            },
        )
        for one, guesses in zip(depths, right, strict=True)
    ]
    device.on = True
    llm.generate(prompts[: args.seqs], sampling[: args.seqs], use_tqdm=False)
    device.reset()
    parts.seconds.clear()
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    took = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "seqs": args.seqs,
        "policy": args.policy,
        "costs": [args.pass_ms, args.row_us, args.boundary_ms],
        "tokens_s": round(tokens / took, 1),
        "device_only": round(tokens / device.busy, 1),
        "of_device": round(device.busy / took, 3),
        "calls": device.calls,
        "syncs": device.syncs,
        "simulated": round(simulated(args, depths, right), 1),
        "host_ms_per_call": round(1e3 * (took - device.waited) / device.calls, 3),
        **({"parts_ms": of_parts(parts, device.calls)} if args.parts else {}),
    }


def of_parts(parts: PartTimer, calls: int) -> dict[str, float]:
    """Milliseconds for each call of the device, the longest first."""
    longest = sorted(parts.seconds.items(), key=lambda item: -item[1])
    return {part: round(1e3 * took / calls, 4) for part, took in longest}


def simulated(args: Namespace, depths: list[list[int]], right: list[list[int]]) -> float:
    """Tokens a second of the best policy; with guesses, of waves."""
    costs = Costs(args.pass_ms, args.row_us / 1e3, args.boundary_ms, 0.0, 0.0)
    kv = "exact" if args.policy == "off" else args.policy
    plain = best(costs, depths, PROMPT, Policy(kv, args.seqs, MAX_LOOPS, lazy=True))[0].rate
    if args.speculate == "off":
        return plain
    waves = WAVES if args.speculate == "auto" else [tuple(map(int, args.speculate.split(",")))]
    rates = [simulate_waves(costs, depths, right, args.seqs, *wave).rate for wave in waves]
    return max(rates) if args.speculate != "auto" else max(plain, *rates)


def table() -> list[dict[str, Any]]:
    """Prints all rows, each measured in a process of its own, and returns them."""
    print(
        "| pass, boundary (ms) | sequences | policy | of device | tokens/s | on/off (simulated) |"
    )
    print("|---|---|---|---|---|---|")
    rows, off = [], dict[Any, dict[str, Any]]()
    for seqs, policy, costs in TABLE:
        given = ("--pass-ms", "--row-us", "--boundary-ms")
        options = [str(item) for pair in zip(given, costs, strict=True) for item in pair]
        command = [sys.executable, __file__, "--seqs", str(seqs), "--policy", policy, "--json"]
        if seqs == 256:
            options += ["--waves", "1"]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(row)
        base = off.setdefault((seqs, costs), row)
        ratio = row["tokens_s"] / base["tokens_s"], row["simulated"] / base["simulated"]
        speed = "" if policy == "off" else f"{ratio[0]:.2f} ({ratio[1]:.2f})"
        print(
            f"| {costs[0]}, {costs[2]} | {seqs} | {policy} | {row['of_device']:.3f} "
            f"| {row['tokens_s']:.0f} | {speed} |",
            flush=True,
        )
    return rows


def text_of(report: dict[str, Any]) -> str:
    """A measurement in words."""
    parts = report.get("parts_ms", {})
    lines = [f"{name:<18} {value}" for name, value in report.items() if name != "parts_ms"]
    if parts:
        lines += ["", "host time, ms for each call of the device:"]
        lines += [f"  {name:<36} {value:.4f}" for name, value in parts.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
