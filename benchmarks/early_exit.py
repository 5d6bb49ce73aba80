"""Early exit on against off, and off against a plain loop, on one engine and one machine.

    python benchmarks/early_exit.py            # batches of 4, 16 and 64: hours on a slow CPU
    python benchmarks/early_exit.py --seqs 16 --tokens 24 --waves 2 --policies last_exited

Each engine runs in a process of its own; off and on alternate in it. Exit depths are replayed from
a seeded truncated geometric law. The simulated policy (`policy.py`) gets the costs measured in the
same run. `--write FILE` keeps everything as JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from policy import Costs, best, geometric, simulate

MAX_DEPTH = 8
PROMPT = 4
BASE = {
    "model_type": "qwen3",
    "num_hidden_layers": 12,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MODEL = {
    "model_type": "loopus",
    "architectures": ["LoopUSForCausalLM"],
    "base_config": BASE,
    "encoder_layer_indices": [0],
    "reasoning_layer_indices": list(range(1, 11)),
    "decoder_layer_indices": [11],
    "max_loops": MAX_DEPTH,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seqs", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--policies", nargs="+", default=["exact", "last_exited"])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a request")
    parser.add_argument("--waves", type=int, default=4, help="requests for each sequence slot")
    parser.add_argument("--mean", type=float, default=3.0, help="mean exit depth")
    parser.add_argument("--quorum", default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--no-plain", action="store_true", help="leave the plain loop out")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child's job, as JSON
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(run_engine(**json.loads(args.one))), flush=True)
        return
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}",
        "command": " ".join(sys.argv),
        "runs": [],
    }
    print(f"{report['date']}  {report['machine']}\n")
    for seqs in args.seqs:
        rng = np.random.default_rng(seqs)
        law = geometric(args.mean, MAX_DEPTH)
        exits = rng.choice(np.arange(1, MAX_DEPTH + 1), (args.waves * seqs, args.tokens), p=law)
        job = {"seqs": seqs, "exits": exits.tolist(), "repeats": args.repeats}
        plain = None
        if not args.no_plain:
            plain = child({**job, "policy": "plain", "quorum": args.quorum})["rates"]["off"]
        for policy in args.policies:
            result = child({**job, "policy": policy, "quorum": args.quorum})
            row = {"seqs": seqs, "policy": policy, "plain": plain, **result}
            row |= compared(row, exits.tolist(), seqs, policy)
            report["runs"].append(row)
            print(line(row), flush=True)
    if args.write:
        args.write.write_text(json.dumps(report, indent=1))


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one engine in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if not results:
        raise SystemExit(f"the engine failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(results[0].removeprefix("RESULT "))
    return result


def run_engine(
    seqs: int, exits: list[list[int]], repeats: int, policy: str, quorum: str
) -> dict[str, Any]:
    """Tokens a second with early exit off and on; what passes and boundaries took."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
    )
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM

    options: dict[str, Any] = {}
    if policy == "plain":  # the model's own forward, a fixed loop, under vLLM's own classes
        options = {
            "scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler",
            "worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker",
        }
    else:
        share = quorum if quorum == "auto" else float(quorum)
        # The simulated policy takes prompts to the full depth.
        loopus = {"kv_policy": policy, "exit_quorum": share, "prefill_depth": "full"}
        options = {"additional_config": {"loopus": loopus}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        llm = LLM(
            folder,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=256,
            max_num_seqs=seqs,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            **options,
        )
        log = StepLog(llm.llm_engine.engine_core.engine_core.scheduler)
        fixed = [[MAX_DEPTH] * len(depths) for depths in exits]
        generate(llm, [depths[:2] for depths in fixed[:seqs]])  # warm-up
        rates: dict[str, list[float]] = {"off": [], "on": []}
        counts: dict[str, Any] = {}
        for _ in range(repeats):
            for name, depths in (("off", fixed), ("on", exits)):
                if name == "on" and policy == "plain":
                    continue
                log.begin(name)
                started = time.perf_counter()
                generate(llm, depths)
                tokens = sum(map(len, depths))
                rates[name].append(tokens / (time.perf_counter() - started))
                counts[name] = log.counts(tokens)
    if policy == "plain":
        return {"rates": rates, "counts": counts, "costs": None, "around": None}
    return {"rates": rates, "counts": counts, "costs": log.costs(), "around": around_model(llm)}


def around_model(llm: Any) -> dict[str, float]:
    """Milliseconds of a pass with early exit off: in the model, and of the loop around it."""
    core = llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    log, refine, inside = StepLog(core.scheduler), model.refine, []

    def timed_refine(*args: Any) -> Any:
        started = time.perf_counter()
        result = refine(*args)
        inside.append(time.perf_counter() - started)
        return result

    model.refine = timed_refine
    log.begin("around")
    generate(llm, [[MAX_DEPTH] * 9] * core.scheduler.max_num_running_reqs)
    passes = [seconds for step in log.steps["around"] for seconds in step[2]]
    inside = inside[: len(passes)]  # the last step is not logged
    return {
        "model": 1e3 * sum(inside) / len(inside),
        "around": 1e3 * (sum(passes) - sum(inside)) / len(inside),
    }


def generate(llm: Any, exits: list[list[int]]) -> None:
    from vllm import SamplingParams

    rng = np.random.default_rng(0)
    prompts = [
        {"prompt_token_ids": rng.integers(10, BASE["vocab_size"], PROMPT).tolist()} for _ in exits
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=len(depths),
            ignore_eos=True,
            detokenize=False,
            extra_args={"exit_depths": depths},
        )
        for depths in exits
    ]
    llm.generate(prompts, params, use_tqdm=False)


class StepLog:
    """Rows and times of every step, read off what the scheduler gets."""

    def __init__(self, scheduler: Any) -> None:
        self.steps: dict[str, list[tuple[float, list[int], list[float], int, int]]] = {}
        self._name = ""
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def timed_schedule(*args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            if self._pending is not None:
                self.steps[self._name].append((now - self._before, *self._pending))
            self._pending, self._before = None, now
            return schedule(*args, **kwargs)

        def read_update(scheduled: Any, output: Any) -> Any:
            loop = getattr(output, "loop", None)
            if loop is not None and self._name:
                self._pending = (
                    loop.passes,
                    loop.pass_seconds,
                    len(loop.exit_depths),
                    loop.decoder_rows,
                )
            return update(scheduled, output)

        self._pending: Any = None
        self._before = 0.0
        scheduler.schedule, scheduler.update_from_output = timed_schedule, read_update

    def begin(self, name: str) -> None:
        self._name, self._pending = name, None
        self.steps[name] = []

    def counts(self, tokens: int) -> dict[str, float]:
        """Passes a token and rows a pass."""
        steps = self.steps[self._name]
        passes = sum(len(step[1]) for step in steps)
        rows = sum(sum(step[1]) for step in steps)
        decoder = sum(step[4] for step in steps)
        return {
            "passes": passes / tokens,
            "rows": rows / max(passes, 1),
            "decoder_rows": decoder / tokens,
        }

    def costs(self) -> dict[str, float]:
        """Least squares over all steps of the last off and on runs, milliseconds."""
        steps = [step for name in self.steps.values() for step in name]
        rows = np.array([n for step in steps for n in step[1]], dtype=float)
        seconds = np.array([t for step in steps for t in step[2]])
        c0, c1 = fitted([np.ones_like(rows), rows], 1e3 * seconds)
        rest = np.array([step[0] - sum(step[2]) for step in steps])
        tokens = np.array([step[3] for step in steps], dtype=float)
        extra = np.array([step[4] for step in steps], dtype=float)
        d0, d1, d2 = fitted([np.ones_like(tokens), tokens, extra], 1e3 * rest)
        return {"c0": c0, "c1": c1, "d0": d0, "d1": d1, "d2": d2}


def fitted(columns: list[np.ndarray], values: np.ndarray) -> list[float]:
    """Least squares without negative coefficients (a column that wants one is left out)."""
    use = list(range(len(columns)))
    while True:
        found = np.linalg.lstsq(np.stack([columns[i] for i in use], 1), values, rcond=None)[0]
        if (found >= 0).all():
            return [float(found[use.index(i)]) if i in use else 0.0 for i in range(len(columns))]
        use.pop(int(found.argmin()))


def compared(row: dict[str, Any], exits: list[list[int]], seqs: int, policy: str) -> dict[str, Any]:
    """Ratios, and what the simulated policy makes of the same costs."""
    on, off = np.mean(row["rates"]["on"]), np.mean(row["rates"]["off"])
    costs = Costs(**row["costs"])
    simulated, quorum = best(costs, exits, PROMPT, seqs, MAX_DEPTH, policy)
    fixed = [[MAX_DEPTH] * len(depths) for depths in exits]
    base = simulate(costs, fixed, PROMPT, seqs, MAX_DEPTH, policy, 1.0)
    return {
        "ratio": float(on / off),
        "simulated_ratio": simulated.rate / base.rate,
        "of_simulated": float(on / simulated.rate),
        "simulated_quorum": quorum,
        "simulated_passes": simulated.passes,
        "simulated_rows": simulated.rows,
        "off_over_plain": None if row["plain"] is None else float(off / np.mean(row["plain"])),
    }


def line(row: dict[str, Any]) -> str:
    counts, costs = row["counts"]["on"], row["costs"]
    plain = "" if row["plain"] is None else f"  off/plain {row['off_over_plain']:.3f}"
    return (
        f"{row['policy']:<11} {row['seqs']:>3} sequences: {row['ratio']:.2f}x  "
        f"(simulated {row['simulated_ratio']:.2f}x at quorum {row['simulated_quorum']:g}; "
        f"tokens/s {np.mean(row['rates']['on']):.2f} = {row['of_simulated']:.2f} of simulated)"
        f"{plain}\n"
        f"    passes/token {counts['passes']:.3f} (simulated {row['simulated_passes']:.3f})"
        f"  rows/pass {counts['rows']:.1f} (simulated {row['simulated_rows']:.1f})"
        f"  decoder rows/token {counts['decoder_rows']:.2f}\n    costs, ms: pass "
        f"{costs['c0']:.1f} + {costs['c1']:.2f} rows, boundary {costs['d0']:.1f} + "
        f"{costs['d1']:.2f} tokens + {costs['d2']:.2f} decoder rows\n    a pass at full depth, ms: "
        f"{row['around']['model']:.2f} in the model, {row['around']['around']:.2f} around it"
    )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
    flags = next((text for text in lines if text.startswith("flags")), "")
    width = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    return f"{names[0] if names else platform.machine()} ({width})"


if __name__ == "__main__":
    main()
