"""How much faster are answers at full depth with guessed positions, on this machine?

For whoever wonders whether to set `speculate`; docs/early-exit.md says what it does.

    python benchmarks/guesses.py                                  # a 6-layer random model, replayed
    python benchmarks/guesses.py --model loopus-tiny --seqs 1     # what the model guesses itself
    python benchmarks/guesses.py --model my-loopus --texts texts.jsonl --dtype float32

Engines with different settings answer the same requests in turn; the ratios are to the engine
without guesses. A random model knows nothing, so whether its guesses are right is replayed
(`--acceptance`). With `--model` guesses are the model's own, after prompts of loopus-tiny's
tasks or the beginnings of `--texts` ({"text": ...} lines), every token at full depth: then the
answers have to be the same, which is checked. In bf16 two logits may be the same, and either wins.
"""

import json
import os
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vllm_loopus.bench.models import SIZES, write_config
from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.bench.workloads import Generator
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.tiny.tasks import evaluation_set

OFF = "off"
BEGINNING = 240  # characters


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--model", help="a folder or an alias; default: random weights")
    parser.add_argument("--texts", type=Path, help="JSON lines with text, for --model")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the random model")
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--mean", type=float, default=8.0, help="mean exit depth, replayed")
    parser.add_argument("--acceptance", type=float, default=0.9, help="replayed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=["1,7", "1,3", "2,3", "auto"],
                        help="auto, or DRAFT_DEPTH,LOOKAHEAD")  # fmt: skip
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    if args.texts and not args.model:
        parser.error("--texts needs --model: random weights have no tokenizer")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    report = begin()
    report["rows"] = measure(args)
    finish(report, args.write)


def measure(args: Namespace) -> list[dict[str, Any]]:
    """Prints a table, and returns its rows."""
    from vllm import LLM

    rows: list[dict[str, Any]] = []
    print("| sequences | speculate | tokens/s over off | accepted | passes a token |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(write_config(SIZES[args.size].config(), Path(folder) / "model"))
        for seqs in args.seqs:
            engines: dict[str, Any] = {
                setting: LLM(
                    model,
                    dtype=args.dtype,
                    max_num_seqs=seqs,
                    max_model_len=512,
                    enforce_eager=True,
                    enable_prefix_caching=False,
                    kv_cache_memory_bytes=1 << 30,
                    additional_config={"loopus": {"speculate": option(setting)}},
                    **({} if args.model else {"load_format": "dummy", "skip_tokenizer_init": True}),
                )
                for setting in [OFF, *args.settings]
            }
            work = requests(args, seqs)
            answers = {name: run(llm, *work)[0] for name, llm in engines.items()}  # warm up
            if args.model:
                assert all(found == answers[OFF] for found in answers.values())
            stats = {name: watch(llm) for name, llm in engines.items()}
            taken: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(args.rounds):
                for name, llm in engines.items():
                    taken[name].append(run(llm, *work)[1])
            for name in engines:
                ratios = [off / own for off, own in zip(taken[OFF], taken[name], strict=True)]
                rows.append(row(name, seqs, median(ratios), stats[name]))
                print(
                    "| {sequences} | {speculate} | {over_off:.2f} | {accepted:.2f} "
                    "| {passes_a_token:.2f} |".format(**rows[-1]),
                    flush=True,
                )
            for llm in engines.values():
                llm.llm_engine.engine_core.shutdown()
    return rows


def option(setting: str) -> Any:
    """The engine option for a setting of the command line."""
    if "," not in setting:
        return setting
    draft_depth, lookahead = map(int, setting.split(","))
    return {"draft_depth": draft_depth, "lookahead": lookahead}


def requests(args: Namespace, seqs: int) -> tuple[list[Any], list[Any]]:
    """Prompts and sampling parameters of two requests for each sequence."""
    from vllm import SamplingParams

    common: dict[str, Any] = {"temperature": 0, "max_tokens": args.tokens, "ignore_eos": True}
    if args.model:
        if args.texts:
            begun = [json.loads(line)["text"] for line in args.texts.read_text().splitlines()]
        else:
            begun = [item.question for item in evaluation_set(0, 2)]
        prompts = [{"prompt": begun[at % len(begun)][:BEGINNING]} for at in range(2 * seqs)]
        return prompts, [
            SamplingParams(**common, extra_args={"exit_threshold": 1.0}) for _ in prompts
        ]
    rng, size = np.random.default_rng(5), SIZES[args.size]
    generator = Generator(size.vocabulary, size.max_loops, args.mean)
    sampling = []
    for _ in range(2 * seqs):
        knobs: dict[str, Any] = {
            "guesses": (rng.random(args.tokens) < args.acceptance).astype(int).tolist()
        }
        if args.mean < size.max_loops:
            knobs["exit_depths"] = generator.independent_exits(rng, args.tokens)
        sampling.append(SamplingParams(**common, detokenize=False, extra_args=knobs))
    return [{"prompt_token_ids": generator.prompt(rng, 8)} for _ in sampling], sampling


def run(llm: Any, prompts: list[Any], sampling: list[Any]) -> tuple[list[list[int]], float]:
    """Answers, and the seconds that they took."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    taken = time.perf_counter() - began
    return [list(output.outputs[0].token_ids) for output in outputs], taken


def watch(llm: Any) -> LoopStats:
    """What the loop of an engine does from now on; several engines here share one registry of
    metrics."""
    total, core = LoopStats(), llm.llm_engine.engine_core.engine_core
    sequences = core.model_executor.driver_worker.worker.model_runner._sequences
    finish = sequences.finish

    def watched() -> Any:
        progress = finish()
        total.add(replace(progress.stats, exit_depths=list(progress.exit_depths.values())))
        return progress

    sequences.finish = watched
    return total


def row(setting: str, seqs: int, ratio: float, stats: LoopStats) -> dict[str, Any]:
    """A row of the table."""
    right, wrong = len(stats.confirmed_guesses), len(stats.rejected_guesses)
    return {
        "sequences": seqs,
        "speculate": setting,
        "over_off": ratio,
        "accepted": right / (right + wrong) if right + wrong else 0.0,
        "passes_a_token": len(stats.passes) / len(stats.exit_depths),
    }


if __name__ == "__main__":
    main()
