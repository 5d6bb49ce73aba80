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

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.emulated import Device, Parts, Times, install, watch_parts

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
# Hidden size, MLP size, layers, width of q and o, width of k and v, vocabulary.
MODELS = {
    "qwen3-0.6b": (1024, 3072, 28, 2048, 1024, 151936),
    "qwen3-1.7b": (2048, 6144, 28, 2048, 1024, 151936),
    "qwen3-4b": (2560, 9728, 36, 4096, 1024, 151936),
    "qwen3-8b": (4096, 12288, 36, 4096, 1024, 151936),
}
LOOPED = 0.5  # of the layers; encoder and decoder have the others


def roofline(model: str, card: str) -> tuple[float, float, float]:
    """Milliseconds a pass, microseconds a row of it, milliseconds a boundary: weights are read once
    a call; a row costs its operations."""
    hidden, mlp, layers, queries, keys, vocabulary = MODELS[model]
    bandwidth, operations = CARDS[card]
    layer = 2 * hidden * (queries + keys) + 3 * hidden * mlp
    looped = LOOPED * layers * layer
    others = (1 - LOOPED) * layers * layer + vocabulary * hidden
    row = 2 * looped / (0.5 * operations)
    return 2e3 * looped / (0.5 * bandwidth), 1e6 * row, 2e3 * others / (0.5 * bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--parts", action="store_true", help="host time by part")
    args = parser.parse_args()
    if bool(args.model) != bool(args.card):
        parser.error("--model and --card go together")
    if args.model:
        args.pass_ms, args.row_us, args.boundary_ms = roofline(args.model, args.card)
    if args.seqs is None:
        table()
        return
    result = measure(args)
    print(json.dumps(result) if args.json else text_of(result))


def measure(args: argparse.Namespace) -> dict[str, Any]:
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
    parts = Parts()
    if args.parts:
        watch_parts(parts)
    on = args.policy != "off"
    loopus: dict[str, Any] = {
        "kv_policy": args.policy if on else "exact",
        "overlap": args.overlap,
        "late_verdicts": args.late_verdicts,
    }
    count = round(args.waves * args.seqs)
    depths = exits(count, args.tokens, MEAN if on else MAX_LOOPS)
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=args.seqs,
            enforce_eager=True,
            kv_cache_memory_bytes=3 << 30,
            additional_config={"loopus": loopus},
        )
    prompts: list[Any] = [
        {"prompt_token_ids": [(7 * i + 3 * j + 1) % 500 for j in range(PROMPT)]}
        for i in range(count)
    ]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=args.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"exit_depths": one} if on else None,
        )
        for one in depths
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
        "simulated": round(simulated(args, depths), 1),
        "host_ms_per_call": round(1e3 * (took - device.waited) / device.calls, 3),
        **({"parts_ms": of_parts(parts, device.calls)} if args.parts else {}),
    }


def of_parts(parts: Parts, calls: int) -> dict[str, float]:
    """Milliseconds for each call of the device, the longest first."""
    return {part: round(1e3 * took / calls, 4) for part, took in parts.seconds.most_common()}


def simulated(args: argparse.Namespace, depths: list[list[int]]) -> float:
    """Tokens a second of the best policy."""
    from vllm_loopus.bench.policy import Costs, Policy, best

    costs = Costs(args.pass_ms, args.row_us / 1e3, args.boundary_ms, 0.0, 0.0)
    kv = "exact" if args.policy == "off" else args.policy
    return best(costs, depths, PROMPT, Policy(kv, args.seqs, MAX_LOOPS, lazy=True))[0].rate


def exits(count: int, tokens: int, mean: float) -> list[list[int]]:
    """The exit depths of the tokens of each request."""
    import numpy as np

    from vllm_loopus.bench.policy import geometric

    rng = np.random.default_rng(11)
    law, every = geometric(mean, MAX_LOOPS), np.arange(1, MAX_LOOPS + 1)
    return [rng.choice(every, size=tokens, p=law).tolist() for _ in range(count)]


def write_config(folder: Path) -> None:
    """A looped model of three thin layers: what computes is emulated."""
    base = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    config = {
        "model_type": "lds",
        "N": MAX_LOOPS,
        "q_threshold": 2.0,
        "q_eval_interval": 1,
        "halting_strategy": "threshold",
        "convergence_epsilon": 0.01,
        "base_model_name_or_path": "x",
        "base_config_dict": base,
        "encoder_layer_indices": [0],
        "reasoning_layer_indices": [1],
        "decoder_layer_indices": [2],
    }
    (folder / "config.json").write_text(json.dumps(config))


def table() -> None:
    """All rows, each in a process of its own."""
    print(
        "| pass, boundary (ms) | sequences | policy | of device | tokens/s | on/off (simulated) |"
    )
    print("|---|---|---|---|---|---|")
    off: dict[Any, dict[str, Any]] = {}
    for seqs, policy, costs in TABLE:
        given = ("--pass-ms", "--row-us", "--boundary-ms")
        options = [str(item) for pair in zip(given, costs, strict=True) for item in pair]
        command = [sys.executable, __file__, "--seqs", str(seqs), "--policy", policy, "--json"]
        if seqs == 256:
            options += ["--waves", "1"]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.strip().splitlines()[-1])
        base = off.setdefault((seqs, costs), row)
        ratio = row["tokens_s"] / base["tokens_s"], row["simulated"] / base["simulated"]
        speed = "" if policy == "off" else f"{ratio[0]:.2f} ({ratio[1]:.2f})"
        print(
            f"| {costs[0]}, {costs[2]} | {seqs} | {policy} | {row['of_device']:.3f} "
            f"| {row['tokens_s']:.0f} | {speed} |",
            flush=True,
        )


def text_of(row: dict[str, Any]) -> str:
    """A measurement in words."""
    parts = row.pop("parts_ms", {})
    lines = [f"{name:<18} {value}" for name, value in row.items()]
    if parts:
        lines += ["", "host time, ms for each call of the device:"]
        lines += [f"  {name:<36} {value:.4f}" for name, value in parts.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
