"""Memory and prefill by depth: blocks in use, sequences at once, time to first token.

    python benchmarks/kv_by_depth.py     # everything: ten minutes on two slow cores
    python benchmarks/kv_by_depth.py --only ttft

A small model with dummy weights in float32; exit depths are replayed or bounded by `max_loops`.
Times are ratios within one process, modes alternating. `--write FILE` keeps everything as JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
from vllm_loopus.bench.policy import geometric

DEPTH, BLOCK, VOCABULARY = 8, 32, 512
LAW = geometric(3.0, DEPTH)
PASS_COST, DECODER_ROW = 16, 0.1  # in rows of a pass: for the clock of the mixed workload


def model_config(hidden: int, layers: int) -> dict[str, Any]:
    """One layer each in encoder and decoder."""
    base = {
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return {
        "model_type": "loopus",
        "architectures": ["LoopUSForCausalLM"],
        "base_config": base,
        "encoder_layer_indices": [0],
        "reasoning_layer_indices": list(range(1, layers - 1)),
        "decoder_layer_indices": [layers - 1],
        "max_loops": DEPTH,
        "exit_threshold": 2.0,
    }


class Engine:
    """vLLM in this process, and what happens at each of its steps."""

    def __init__(self, folder: str, loopus: dict[str, Any], **options: Any) -> None:
        from vllm import LLM

        defaults = {"max_model_len": 1024, "max_num_seqs": 32, "enable_prefix_caching": False}
        self.llm = LLM(
            folder,
            load_format="dummy",
            dtype="float32",
            block_size=BLOCK,
            skip_tokenizer_init=True,
            additional_config={"loopus": loopus},
            **{**defaults, **options},
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self._sequences = core.model_executor.driver_worker.worker.model_runner._sequences
        self._count = 0
        self.rows = 0  # of passes, so far
        self.clock = 0.0  # what they and the decoder cost, in rows
        self._sequences.step = self._counting(self._sequences.step)

    def _counting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            decoded, progress = step(*args)
            stats = progress.stats
            self.rows += sum(stats.passes)
            work = sum(stats.passes) + DECODER_ROW * stats.decoder_rows
            self.clock += work + PASS_COST * len(stats.passes)
            return decoded, progress

        return counted

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    @property
    def in_use(self) -> int:
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def add(self, prompt: list[int], tokens: int, **knobs: Any) -> str:
        from vllm import SamplingParams

        self._count += 1
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=knobs
        )
        name = f"r{self._count}"
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def step(self) -> list[Any]:
        return self.llm.llm_engine.step()

    def computed(self) -> tuple[set[int], Counter[int]]:
        """Blocks that hold a computed position, and how many blocks of positions have how many
        planes, from the worker's watermarks."""
        pairs: set[int] = set()
        planes: Counter[int] = Counter()
        for request in self.scheduler.running:
            sequence = self._sequences._running[request.request_id].sequence
            tables = self._sequences._tables
            table = tables._tables[tables._index[request.request_id]]
            for column in range(-(-sequence.done[0] // BLOCK)):
                first, behind = column * BLOCK, (column + 1) * BLOCK
                taken_over = sequence.last_exited and behind > sequence.prefill_end
                depths = [
                    d
                    for d in range(1, sequence.max_depth + 1)
                    if sequence.done[d] > first or (taken_over and sequence.done[0] > first)
                ]
                pairs |= {int(table[d - 1, column]) for d in depths}
                planes[len(depths)] += 1
        return pairs, planes


def prompt_of(rng: Any, length: int) -> list[int]:
    tokens: list[int] = rng.integers(10, VOCABULARY, length).tolist()
    return tokens


def drive(engine: Engine, watch: Callable[[], None]) -> None:
    """Steps until nothing is left, calling `watch` between steps."""
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        watch()


def memory(folder: str) -> dict[str, Any]:
    """Half of the requests with `max_loops` 2, half 8, none leaving early; and random depths."""
    result: dict[str, Any] = {}
    prompt, new, count = 64, 64, 24
    for policy in ("exact", "last_exited"):
        engine = Engine(folder, {"kv_policy": policy})
        for load in ("budgets 2 and 8", "random depths"):
            rng = np.random.default_rng(1)
            for index in range(count):
                knobs: dict[str, Any] = {"max_loops": 8 if index % 2 else 2}
                if load == "random depths":
                    exits = rng.choice(np.arange(1, DEPTH + 1), new, p=LAW)
                    knobs = {"exit_depths": exits.tolist()}
                engine.add(prompt_of(rng, prompt), new, **knobs)
            seen = {"over": 0.0, "peak": 0, "full": 0, "sum": 0, "full_sum": 0}
            planes: Counter[int] = Counter()

            def watch(
                engine: Engine = engine, seen: dict[str, Any] = seen, planes: Counter[int] = planes
            ) -> None:
                pairs, by_planes = engine.computed()
                full = DEPTH * sum(
                    -(-r.num_tokens // BLOCK)
                    for r in engine.scheduler.running  # the sampled token's block is reserved too
                )
                if pairs:
                    seen["over"] = max(seen["over"], engine.in_use / len(pairs))
                seen["peak"] = max(seen["peak"], engine.in_use)
                seen["full"] = max(seen["full"], full)
                seen["sum"] += engine.in_use
                seen["full_sum"] += full
                planes.update(by_planes)

            drive(engine, watch)
            total = sum(planes.values())
            result[f"{policy}, {load}"] = row = {
                "blocks over computed pairs, most": seen["over"],
                "peak over full allocation": seen["peak"] / seen["full"],
                "mean over full allocation": seen["sum"] / seen["full_sum"],
                "share of blocks with so many planes": {
                    str(n): round(planes[n] / total, 3) for n in sorted(planes)
                },
                "blocks left at the end": engine.in_use,
            }
            show(f"{policy}, {load}", row)
        engine.close()
    return result


def concurrency(folder: str) -> dict[str, Any]:
    """A pool in which full allocation holds 8 sequences."""
    prompt, new, count = 64, 64, 32
    blocks = 8 * DEPTH * -(-(prompt + new) // BLOCK) + 1
    result = {}
    for policy in ("exact", "last_exited"):
        engine = Engine(
            folder, {"kv_policy": policy}, num_gpu_blocks_override=blocks, max_model_len=512
        )
        rng = np.random.default_rng(2)
        for most in (2, 8) * 5:  # what sequences need is learned
            engine.add(prompt_of(rng, prompt), new, max_loops=most)
        drive(engine, lambda: None)
        for index in range(count):
            engine.add(prompt_of(rng, prompt), new, max_loops=8 if index % 2 else 2)
        running: list[int] = []
        grown: list[int] = []  # of them, those beyond half of their new tokens

        def watch(
            engine: Engine = engine, running: list[int] = running, grown: list[int] = grown
        ) -> None:
            requests = engine.scheduler.running
            running.append(len(requests))
            grown.append(sum(r.num_tokens > prompt + new // 2 for r in requests))

        requests: dict[str, Any] = engine.scheduler.requests
        everything = list(requests.values())
        drive(engine, watch)
        result[policy] = row = {
            "blocks": blocks,
            "running at once, most": max(running),
            "running, mean": statistics.mean(running),
            "beyond half their tokens at once, most": max(grown),
            "preemptions": sum(r.num_preemptions for r in everything),
            "finished": sum(r.is_finished() for r in everything),
        }
        show(f"at once, {policy}", row)
        engine.close()
    return result


def ttft(folder: str, repeats: int) -> dict[str, Any]:
    """Time to first token of a 512-token prompt that leaves at depth 2."""
    engines = {
        mode: Engine(folder, {"prefill_depth": mode}, max_num_batched_tokens=2048)
        for mode in ("lazy", "full")
    }
    seconds: dict[str, list[float]] = {mode: [] for mode in engines}
    for number in range(repeats + 1):
        for mode, engine in engines.items():
            rng = np.random.default_rng(number)
            started = time.perf_counter()
            engine.add(prompt_of(rng, 512), 1, exit_depths=[2])
            drive(engine, lambda: None)
            if number:  # the first is the warm-up
                seconds[mode].append(time.perf_counter() - started)
    for engine in engines.values():
        engine.close()
    lazy, full = (statistics.median(seconds[mode]) for mode in ("lazy", "full"))
    result = {"lazy s": lazy, "full s": full, "lazy over full": lazy / full}
    show("time to first token, 512 tokens, exit depth 2", result)
    return result


def mixed(folder: str, repeats: int, load: float) -> dict[str, Any]:
    """Long-tailed prompts that arrive at random, random depths: which `prefill_depth` is better.

    By a clock that counts rows and passes, so that the machine does not matter.
    """
    modes = ("lazy", "full")
    runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for mode in modes:
        loopus = {"prefill_depth": mode, "exit_quorum": 0.5}
        engine = Engine(folder, loopus, max_num_batched_tokens=512, max_num_seqs=16)
        runs[mode] = [arrivals(engine, seed, load) for seed in range(repeats)]
        engine.close()
    result: dict[str, Any] = {"load": load}
    for name in runs["lazy"][0]:
        ratios = [a[name] / b[name] for a, b in zip(runs["lazy"], runs["full"], strict=True)]
        lazy, full = (statistics.mean(run[name] for run in runs[mode]) for mode in modes)
        result[name] = {"lazy": lazy, "full": full, "lazy over full, each run": ratios}
    show("mixed workload", result)
    return result


def arrivals(engine: Engine, seed: int, load: float, count: int = 40) -> dict[str, float]:
    """One run. `load`: arrivals for 1000 rows of the clock."""
    rng = np.random.default_rng(seed)
    times = engine.clock + np.cumsum(rng.exponential(1000 / load, count))
    lengths = np.clip(rng.lognormal(4.2, 0.9, count), 8, 512).astype(int)
    tokens = np.clip(rng.lognormal(2.8, 0.6, count), 4, 64).astype(int)
    arrived: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    rows, number, started = engine.rows, 0, engine.clock
    while number < count or engine.llm.llm_engine.has_unfinished_requests():
        if not engine.llm.llm_engine.has_unfinished_requests():
            engine.clock = max(engine.clock, times[number])
        while number < count and times[number] <= engine.clock:
            exits = rng.choice(np.arange(1, DEPTH + 1), tokens[number], p=LAW).tolist()
            prompt = prompt_of(rng, lengths[number])
            name = engine.add(prompt, int(tokens[number]), exit_depths=exits)
            arrived[name] = times[number]
            number += 1
        for output in engine.step():
            first.setdefault(output.request_id, engine.clock)
            last[output.request_id] = engine.clock
    waits = sorted(first[name] - arrived[name] for name in arrived)
    whole = sorted(last[name] - arrived[name] for name in arrived)
    return {
        "time in all": engine.clock - started,
        "rows": engine.rows - rows,
        "time to first token, median": statistics.median(waits),
        "time to first token, p90": waits[int(0.9 * count)],
        "time of a request, median": statistics.median(whole),
        "time of a request, p90": whole[int(0.9 * count)],
    }


def arithmetic(traces: Path | None) -> dict[str, Any]:
    """Planes that blocks need when depths are independent, and what sharing them could save."""
    within = np.cumsum(LAW)  # P(depth <= d)
    result: dict[str, Any] = {}
    for block in (16, 32):
        # exact: a position is taken along by every later token, so what counts is the deepest of
        # all tokens from the block on.
        exact = {m: mean_most(within, m) for m in (1, block, 4 * block)}
        # last_exited, with blocks shared by all planes below the deepest exit in them.
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


def mean_most(within: Any, draws: int) -> float:
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
    parts: Iterable[str] = ("arithmetic", "memory", "concurrency", "ttft", "mixed")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.9, help="arrivals a 1000 rows (mixed)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--traces", type=Path, help="folder with golden answers")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"command": " ".join(sys.argv)}
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(options.hidden, options.layers)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        jobs: dict[str, Callable[[], dict[str, Any]]] = {
            "arithmetic": lambda: arithmetic(options.traces),
            "memory": lambda: memory(folder),
            "concurrency": lambda: concurrency(folder),
            "ttft": lambda: ttft(folder, options.repeats),
            "mixed": lambda: mixed(folder, options.repeats, options.load),
        }
        for part in options.only:
            report[part] = jobs[part]()
    if options.write:
        options.write.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
