"""What do K/V planes by depth cost? Blocks in use, sequences at once, time to first token.

For developers who change admission, allocation or prefill; docs/kv-layout.md and docs/early-exit.md
have the numbers.

    python benchmarks/kv_by_depth.py                     # everything: ten minutes on two slow cores
    python benchmarks/kv_by_depth.py --only arithmetic   # seconds: nothing is run

A small model with made-up weights in float32; exit depths are replayed, or bounded by `max_loops`.
The time to first token is in seconds, modes alternating in one process. All else is counts: of rows
and passes (mixed), which repeat exactly, and of blocks and sequences (memory, concurrency), which
vary by a percent from run to run, since the engine's quorum follows the time of its passes.
"""

import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
import numpy as np

from vllm_loopus.bench.fleet import ENVIRONMENT
from vllm_loopus.bench.models import ModelSize, write_config
from vllm_loopus.bench.policy import geometric
from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.bench.workers.engine import LocalEngine
from vllm_loopus.bench.workers.probe import Step
from vllm_loopus.bench.workloads import Generator, Request
from vllm_loopus.serving.knobs.engine import KV_POLICIES

MEAN, DEPTH, BLOCK, VOCABULARY = 3.0, 8, 32, 512
GENERATOR = Generator(VOCABULARY, DEPTH, MEAN)
PASS_COST, DECODER_ROW = 16, 0.1  # in rows of a pass: for the clock of the mixed workload


def engine(model: Path, loopus: dict[str, Any], **options: Any) -> LocalEngine:
    """`loopus`: our engine options; `options`: further ones of vLLM's."""
    defaults = {
        "load_format": "dummy",
        "dtype": "float32",
        "block_size": BLOCK,
        "max_model_len": 1024,
        "max_num_seqs": 32,
    }
    return LocalEngine("ours", str(model), loopus, {**defaults, **options})


def with_budget(rng: np.random.Generator, prompt: int, tokens: int, max_loops: int) -> Request:
    """A request of which no token exits before `max_loops`."""
    return Request(GENERATOR.prompt(rng, prompt), tokens, knobs={"max_loops": max_loops})


def with_exits(rng: np.random.Generator, prompt: int, tokens: int) -> Request:
    """A request whose tokens exit at random depths."""
    exits = GENERATOR.independent_exits(rng, tokens)
    return Request(GENERATOR.prompt(rng, prompt), tokens, exits)


def steps(llm: LocalEngine) -> Iterator[None]:
    """Yields after each step, until all requests have ended."""
    while llm.unfinished:
        llm.step()
        yield


def computed(llm: LocalEngine) -> tuple[set[int], Counter[int]]:
    """Blocks that hold a computed position, and how many blocks of positions have how many planes,
    from the worker's watermarks."""
    sequences = llm.probe.runner._sequences
    pairs: set[int] = set()
    planes: Counter[int] = Counter()
    for request in llm.probe.scheduler.running:
        stairs, index = sequences.stairs, sequences.index(request.request_id)
        done, prompt = stairs.done[index], stairs.prefill_end[index]
        table = sequences._tables._tables[index]
        for column in range(-(-done[0] // BLOCK)):
            first, behind = column * BLOCK, (column + 1) * BLOCK
            taken_over = stairs.last_exited and behind > prompt
            depths = [
                d
                for d in range(1, stairs.max_depth[index] + 1)
                if done[d] > first or (taken_over and done[0] > first)
            ]
            pairs |= {int(table[d - 1, column]) for d in depths}
            planes[len(depths)] += 1
    return pairs, planes


class BlocksInUse:
    """Blocks of an engine over its steps, beside what allocating every plane would take."""

    def __init__(self, llm: LocalEngine) -> None:
        self._llm, self._probe = llm, llm.probe
        self._in_use: list[int] = []
        self._full: list[int] = []
        self._over = 0.0  # blocks in use over those with a computed position, at most
        self._planes: Counter[int] = Counter()

    def watch(self) -> None:
        pairs, planes = computed(self._llm)
        self._planes += planes
        self._in_use.append(self._probe.blocks_in_use)
        running = self._probe.scheduler.running  # the sampled token's block is reserved too
        self._full.append(DEPTH * sum(-(-request.num_tokens // BLOCK) for request in running))
        if pairs:
            self._over = max(self._over, self._in_use[-1] / len(pairs))

    def row(self) -> dict[str, Any]:
        total = sum(self._planes.values())
        return {
            "blocks over computed pairs, most": self._over,
            "peak over full allocation": max(self._in_use) / max(self._full),
            "mean over full allocation": sum(self._in_use) / sum(self._full),
            "share of blocks with so many planes": {
                str(n): round(self._planes[n] / total, 3) for n in sorted(self._planes)
            },
            "blocks left at the end": self._probe.blocks_in_use,
        }


def memory(model: Path) -> dict[str, Any]:
    """Half of the requests with `max_loops` 2, half 8, none exiting early; and random depths."""
    result: dict[str, Any] = {}
    prompt, new, count = 64, 64, 24
    for policy in KV_POLICIES:
        llm = engine(model, {"kv_policy": policy})
        for load in ("budgets 2 and 8", "random depths"):
            rng = np.random.default_rng(1)
            for index in range(count):
                if load == "random depths":
                    llm.add(with_exits(rng, prompt, new))
                else:
                    llm.add(with_budget(rng, prompt, new, 8 if index % 2 else 2))
            blocks = BlocksInUse(llm)
            for _ in steps(llm):
                blocks.watch()
            result[f"{policy}, {load}"] = blocks.row()
            show(f"{policy}, {load}", blocks.row())
        llm.close()
    return result


def concurrency(model: Path) -> dict[str, Any]:
    """A pool in which full allocation holds 8 sequences."""
    prompt, new, count = 64, 64, 32
    pool = 8 * DEPTH * -(-(prompt + new) // BLOCK) + 1
    result = {}
    for policy in KV_POLICIES:
        llm = engine(model, {"kv_policy": policy}, num_gpu_blocks_override=pool, max_model_len=512)
        scheduler = llm.probe.scheduler
        rng = np.random.default_rng(2)
        for most in (2, 8) * 5:  # the scheduler learns what sequences need
            llm.add(with_budget(rng, prompt, new, most))
        list(steps(llm))
        for index in range(count):
            llm.add(with_budget(rng, prompt, new, 8 if index % 2 else 2))
        requests = list(scheduler.requests.values())
        # Tokens of the sequences that run, step by step.
        lengths = [[one.num_tokens for one in scheduler.running] for _ in steps(llm)]
        half = prompt + new // 2
        result[policy] = row = {
            "blocks": pool,
            "running at once, most": max(map(len, lengths)),
            "running, mean": statistics.mean(map(len, lengths)),
            "beyond half their tokens at once, most": max(
                sum(length > half for length in running) for running in lengths
            ),
            "preemptions": sum(request.num_preemptions for request in requests),
            "finished": sum(request.is_finished() for request in requests),
        }
        show(f"at once, {policy}", row)
        llm.close()
    return result


def ttft(model: Path, repeats: int) -> dict[str, Any]:
    """Time to first token of a 512-token prompt that exits at depth 2."""
    engines = {
        mode: engine(model, {"prefill_depth": mode}, max_num_batched_tokens=2048)
        for mode in ("lazy", "full")
    }
    seconds: dict[str, list[float]] = {mode: [] for mode in engines}
    for number in range(repeats + 1):
        for mode, llm in engines.items():
            prompt = GENERATOR.prompt(np.random.default_rng(number), 512)
            started = time.perf_counter()
            llm.add(Request(prompt, 1, exits=[2]))
            list(steps(llm))
            if number:  # the first is the warm-up
                seconds[mode].append(time.perf_counter() - started)
    for llm in engines.values():
        llm.close()
    lazy, full = (statistics.median(seconds[mode]) for mode in ("lazy", "full"))
    result = {"lazy s": lazy, "full s": full, "lazy over full": lazy / full}
    show("time to first token, 512 tokens, exit depth 2", result)
    return result


def mixed(model: Path, repeats: int, load: float) -> dict[str, Any]:
    """Long-tailed prompts that arrive at random, random depths: which `prefill_depth` is better.

    By a clock that counts rows and passes, so that the machine does not matter.
    """
    modes = ("lazy", "full")
    runs: dict[str, list[dict[str, float]]] = {}
    for mode in modes:
        loopus = {"prefill_depth": mode, "exit_quorum": 0.5}
        llm = engine(model, loopus, max_num_batched_tokens=512, max_num_seqs=16)
        runs[mode] = [arrivals(llm, seed, load) for seed in range(repeats)]
        llm.close()
    result: dict[str, Any] = {"load": load}
    for name in runs["lazy"][0]:
        ratios = [a[name] / b[name] for a, b in zip(runs["lazy"], runs["full"], strict=True)]
        lazy, full = (statistics.mean(run[name] for run in runs[mode]) for mode in modes)
        result[name] = {"lazy": lazy, "full": full, "lazy over full, each run": ratios}
    show("mixed workload", result)
    return result


def arrivals(llm: LocalEngine, seed: int, load: float, count: int = 40) -> dict[str, float]:
    """One run. `load`: arrivals for 1000 rows of the clock."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1000 / load, count))
    lengths = np.clip(rng.lognormal(4.2, 0.9, count), 8, 512).astype(int)
    tokens = np.clip(rng.lognormal(2.8, 0.6, count), 4, 64).astype(int)
    arrived: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    clock, rows, number = 0.0, 0, 0
    while number < count or llm.unfinished:
        if not llm.unfinished:
            clock = max(clock, times[number])
        while number < count and times[number] <= clock:
            name = llm.add(with_exits(rng, int(lengths[number]), int(tokens[number])))
            arrived[name] = times[number]
            number += 1
        outputs, step = llm.step()
        rows += sum(step.rows)
        clock += cost(step)
        for output in outputs:
            first.setdefault(output.request_id, clock)
            last[output.request_id] = clock
    waits = sorted(first[name] - arrived[name] for name in arrived)
    whole = sorted(last[name] - arrived[name] for name in arrived)
    return {
        "time in all": clock,
        "rows": rows,
        "time to first token, median": statistics.median(waits),
        "time to first token, p90": waits[int(0.9 * count)],
        "time of a request, median": statistics.median(whole),
        "time of a request, p90": whole[int(0.9 * count)],
    }


def cost(step: Step) -> float:
    """Of a step, in rows of a pass."""
    return sum(step.rows) + DECODER_ROW * step.decoder_rows + PASS_COST * len(step.rows)


def arithmetic(traces: Path | None) -> dict[str, Any]:
    """Planes that blocks need when depths are independent, and what sharing them could save."""
    within = np.cumsum(geometric(MEAN, DEPTH))  # P(depth <= d)
    result: dict[str, Any] = {}
    for block in (16, 32):
        # exact: a position is computed at the depth of every later token, so what counts is the
        # deepest of all tokens from the block on.
        exact = {m: mean_most(within, m) for m in (1, block, 4 * block)}
        # last_exited, with blocks shared by all planes up to the deepest exit in them.
        shared = mean_most(within, block)
        result[f"random depths, blocks of {block}"] = {
            "exact: planes with so many tokens from the block on": exact,
            "last_exited: planes stored if shared": shared,
            "saved by sharing": 1 - shared / DEPTH,
        }
    if traces is not None:
        result["last_exited: saved by sharing on golden traces"] = shared_on_traces(traces)
    show("independent depths, mean 3 of 8", result)
    return result


def mean_most(within: np.ndarray, draws: int) -> float:
    """The mean of the greatest of `draws` independent depths."""
    return float(sum(1 - within[d - 1] ** draws if d else 1.0 for d in range(DEPTH)))


def shared_on_traces(folder: Path) -> dict[str, float]:
    """1 - deepest exit in a block / budget, over the traces of early exits at budget 8."""
    depths = [
        case["depths"]
        for backbone in ("qwen3", "llama", "phi3")
        for case in json.loads((folder / backbone / "expected.json").read_text())["cases"]
        if case["N"] == DEPTH and len(set(case["depths"])) > 1
    ]
    return {
        f"blocks of {block}": statistics.mean(
            1 - max(trace[i : i + block]) / DEPTH
            for trace in depths
            for i in range(0, len(trace) - block + 1, block)
        )
        for block in (4, 16)
    }


def show(title: str, values: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        text = f"{value:.3f}" if isinstance(value, float) else json.dumps(value, default=str)
        print(f"  {name}: {text}", flush=True)


def main() -> None:
    parts = ("arithmetic", "memory", "concurrency", "ttft", "mixed")
    parser = script_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.9, help="arrivals a 1000 rows (mixed)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--traces", type=Path, help="folder with golden answers")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    hidden = options.hidden
    size = ModelSize(
        layers=options.layers,
        hidden=hidden,
        intermediate=3 * hidden,
        heads=hidden // 32,
        kv_heads=hidden // 64,
        head_size=32,
        vocabulary=VOCABULARY,
        max_loops=DEPTH,
        longest=2048,
    )
    report = begin()
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(size.config(), Path(folder) / "model")
        jobs: dict[str, Callable[[], dict[str, Any]]] = {
            "arithmetic": lambda: arithmetic(options.traces),
            "memory": lambda: memory(model),
            "concurrency": lambda: concurrency(model),
            "ttft": lambda: ttft(model, options.repeats),
            "mixed": lambda: mixed(model, options.repeats, options.load),
        }
        for part in options.only:
            report[part] = jobs[part]()
    finish(report, options.write)


if __name__ == "__main__":
    main()
