"""How many sequences run at once, and how fast, in K/V memory of a fixed size, by K/V setting?

For whoever sizes memory, or chooses `--kv-cache-dtype` or `kv_planes`; docs/kv-layout.md has the
numbers.

    python benchmarks/kv_memory.py                       # a 6-layer random model: ten minutes
    python benchmarks/kv_memory.py --model loopus-tiny --settings auto fp8 auto,last:4

The pool holds `--hold` sequences at full depth with K/V of the model's dtype, and not one more.
Engines with different settings answer the same requests, enough to fill all of them, in turn;
ratios are to the engine with K/V of the model's dtype and all planes. Exit depths are replayed:
`--means 8 3` for full depth and for independent depths with a mean of 3. The last column is in CPU
time, which neighbours on the machine change less; it means something with OMP_NUM_THREADS=1.
"""

import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vllm_loopus.bench.models import FIRST_TOKEN, SIZES, write_config
from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.bench.workloads import Generator
from vllm_loopus.serving.knobs.engine import KV_POLICIES

BLOCK = 32
FIRST = "auto"  # all planes, K/V of the model's dtype


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--model", help="a folder or an alias; default: random weights")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the random model")
    parser.add_argument("--hold", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--means", type=float, nargs="+", default=[8.0, 3.0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--policies", nargs="+", choices=KV_POLICIES, default=list(KV_POLICIES))
    settings = ["auto", "fp8", "auto,last:4", "auto,last:2", "fp8,last:4"]
    parser.add_argument("--settings", nargs="+", metavar="DTYPE[,PLANES]", default=settings)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report = begin()
    print(
        "| K/V | policy | mean depth | KiB a token | sequences at once | preemptions "
        "| tokens/s, over all planes | per CPU second |\n" + 8 * "|---" + "|"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(write_config(SIZES[args.size].config(), Path(folder) / "model"))
        rows = [row for policy in args.policies for row in measure(args, model, policy)]
    finish({**report, "rows": rows}, args.write)


def measure(args: Namespace, model: str, policy: str) -> list[dict[str, Any]]:
    """The rows of the table of one policy, which it prints."""
    settings = [FIRST, *(setting for setting in args.settings if setting != FIRST)]
    engines = {FIRST: start(args, model, policy, FIRST, 1 << 28)}
    a_block = layout_of(engines[FIRST]).block_bytes_per_token * BLOCK
    blocks = -(-(args.prompt + args.tokens) // BLOCK) * layout_of(engines[FIRST]).planes
    engines[FIRST].llm_engine.engine_core.shutdown()
    pool = a_block * (blocks * (args.hold + 1) - 1)  # one block is vLLM's own
    engines = {setting: start(args, model, policy, setting, pool) for setting in settings}
    rows = []
    for mean in args.means:
        work = requests(args, engines[FIRST], mean)
        watched = {name: watch(llm) for name, llm in engines.items()}
        taken: dict[str, list[float]] = {name: [] for name in engines}
        worked: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(args.rounds + 1):  # the first is for warming up
            for name, llm in engines.items():
                began, cpu = time.perf_counter(), time.process_time()
                llm.generate(*work, use_tqdm=False)
                taken[name].append(time.perf_counter() - began)
                worked[name].append(time.process_time() - cpu)
        for name, llm in engines.items():
            pairs = list(zip(taken[FIRST], taken[name], strict=True))[1:]
            layout = layout_of(llm)
            rows.append(
                {
                    "setting": name,
                    "policy": policy,
                    "mean_depth": mean,
                    "bytes_a_token": layout.allocated(layout.max_loops),
                    "at_once": watched[name]["running"],
                    "preemptions": watched[name]["preemptions"],
                    "ratio": median(first / own for first, own in pairs),
                    "cpu_ratio": median(worked[FIRST][1:]) / median(worked[name][1:]),
                    "tokens_a_second": len(work[0]) * args.tokens / median(taken[name][1:]),
                }
            )
            kib = rows[-1]["bytes_a_token"] / 1024
            print(
                "| {setting} | {policy} | {mean_depth:.0f} | {kib:.1f} | {at_once} | {preemptions} "
                "| {ratio:.2f} | {cpu_ratio:.2f} |".format(kib=kib, **rows[-1]),
                flush=True,
            )
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()
    return rows


def start(args: Namespace, model: str, policy: str, setting: str, pool: int) -> Any:
    """An engine with `pool` bytes of K/V."""
    from vllm import LLM

    dtype, _, planes = setting.partition(",")
    return LLM(
        model,
        dtype=args.dtype,
        max_num_seqs=8 * args.hold,
        max_model_len=args.prompt + args.tokens,
        block_size=BLOCK,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=pool,
        kv_cache_dtype=dtype,
        additional_config={"loopus": {"kv_policy": policy, "kv_planes": planes or "all"}},
        **({} if args.model else {"load_format": "dummy"}),
    )


def layout_of(llm: Any) -> Any:
    """The `KVLayout` of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.model.planes.layout


def requests(args: Namespace, llm: Any, mean: float) -> tuple[list[Any], list[Any]]:
    """Prompts and sampling parameters, four times as many as the first engine holds."""
    from vllm import SamplingParams

    config, rng = llm.model_config.hf_config, np.random.default_rng(5)
    generator = Generator(config.vocab_size, config.max_loops, min(mean, config.max_loops))
    prompts, sampling = [], []
    for _ in range(4 * args.hold):
        knobs: dict[str, Any] = {"exit_threshold": 1.0}
        if mean < config.max_loops:
            knobs["exit_depths"] = generator.independent_exits(rng, args.tokens)
        ids = rng.integers(FIRST_TOKEN, config.vocab_size, args.prompt).tolist()
        prompts.append({"prompt_token_ids": ids})
        sampling.append(
            SamplingParams(
                temperature=0,
                max_tokens=args.tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=knobs,
            )
        )
    return prompts, sampling


def watch(llm: Any) -> dict[str, int]:
    """The most sequences that run at once from now on, and how many are preempted."""
    seen = {"running": 0, "preemptions": 0}
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule = scheduler.schedule

    def watched(*arguments: Any, **named: Any) -> Any:
        output = schedule(*arguments, **named)
        seen["running"] = max(seen["running"], len(scheduler.running))
        seen["preemptions"] += len(output.preempted_req_ids or ())
        return output

    scheduler.schedule = watched
    return seen


if __name__ == "__main__":
    main()
