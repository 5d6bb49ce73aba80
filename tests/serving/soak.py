"""Random arrivals, aborts and knobs on a pool that is too small, for as long as asked.

    python -m tests.serving.soak --minutes 20

Every request's answer is compared with the one it got alone; at the end every block must be free.
"""

import argparse
import random
import time
from dataclasses import dataclass, field
from typing import Any

from tests.conftest import (  # sets vLLM up first
    GOLDEN,
    admit_too_many,
    counter,
    golden_cases,
    kv_manager,
)

BLOCK, LENGTH, NEW_TOKENS = 32, 160, 24
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "dtype": "float32",
    "block_size": BLOCK,
    "max_model_len": LENGTH,
}
# Two sequences of full length and depth, the null block left out.
TINY = {"num_gpu_blocks_override": 2 * (LENGTH // BLOCK) * 8 + 1, "max_num_seqs": 10}


@dataclass
class Report:
    """What happened."""

    seconds: float = 0.0
    finished: int = 0
    aborted: int = 0
    wrong: list[str] = field(default_factory=list)
    preemptions: int = 0
    short_of_planes: int = 0  # times that deeper planes had to preempt
    hits: list[int] = field(default_factory=list)  # positions found at each depth
    most_running: int = 0
    blocks_left: int = 0  # in use at the end

    @property
    def good(self) -> bool:
        return not self.wrong and not self.blocks_left


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts that share beginnings, knobs of every kind, lengths with a long tail."""
    rng = random.Random(seed)
    cases = golden_cases("qwen3")
    texts = [(case["prompt"] + case["tokens"]) * 4 for case in cases[:4]]
    drawn = []
    for _ in range(count):
        length = min(LENGTH - NEW_TOKENS, 1 + int(rng.lognormvariate(3.3, 0.9)))
        most = rng.choice([2, 4, 8, 8])
        knobs: dict[str, Any] = {"max_loops": most, "min_loops": rng.choice([1, 1, min(2, most)])}
        if rng.random() < 0.3:
            knobs["exit_depths"] = [rng.randint(1, most) for _ in range(NEW_TOKENS)]
        else:
            knobs["exit_threshold"] = rng.choice([0.5, 0.6, 0.62, 0.65, 2.0])
        drawn.append({"prompt": rng.choice(texts)[:length], "knobs": knobs})
    return drawn


def params_of(item: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        extra_args=item["knobs"],
    )


def answers_alone(llm: Any, items: list[dict[str, Any]]) -> list[Any]:
    """Each by itself in a pool with room for everything."""
    from vllm_loopus import exit_depths

    answers = []
    for item in items:
        (output,) = llm.generate(
            [{"prompt_token_ids": item["prompt"]}], params_of(item), use_tqdm=False
        )
        answers.append((list(output.outputs[0].token_ids), exit_depths(output)))
    return answers


def soak(
    llm: Any, items: list[dict[str, Any]], answers: list[Any], seconds: float, seed: int
) -> Report:
    """Runs requests drawn from `items` until the time is over and all have finished."""
    from vllm_loopus import exit_depths

    admit_too_many(llm)
    rng, report, engine = random.Random(seed), Report(), llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    running: dict[str, int] = {}  # id -> item
    started, number = time.monotonic(), 0
    rate = 0.3
    while (last := time.monotonic() - started) < seconds or running:
        if rng.random() < 0.01:
            rate = rng.choice([0.05, 0.3, 1.0])  # lulls and bursts
        if last < seconds and rng.random() < rate and len(running) < 30:
            index = rng.randrange(len(items))
            name = f"s{number}"
            number += 1
            prompt = {"prompt_token_ids": items[index]["prompt"]}
            engine.add_request(name, prompt, params_of(items[index]))
            running[name] = index
        for output in engine.step():
            if output.finished and output.request_id in running:
                index = running.pop(output.request_id)
                answer = (list(output.outputs[0].token_ids), exit_depths(output))
                report.finished += 1
                if answer != answers[index]:
                    report.wrong.append(f"{output.request_id}: {items[index]}")
        report.most_running = max(report.most_running, len(scheduler.running))
        if running and rng.random() < 0.01:
            name = rng.choice(list(running))
            engine.abort_request([name])
            del running[name]
            report.aborted += 1
    while engine.has_unfinished_requests():
        engine.step()
    report.seconds = time.monotonic() - started
    report.preemptions = counter(llm, "vllm:num_preemptions")
    report.hits = list(kv_manager(llm).hits_by_depth)
    report.short_of_planes = kv_manager(llm).short_of_planes
    pool = kv_manager(llm).block_pool
    report.blocks_left = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    return report


def main() -> None:
    from vllm import LLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=150, help="different ones")
    parser.add_argument("--prefill-depth", choices=("lazy", "full"), default="lazy")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    items = requests(options.requests, options.seed)
    loopus = {"loopus": {"prefill_depth": options.prefill_depth}}
    alone = LLM(
        str(GOLDEN / "qwen3"), **OPTIONS, enable_prefix_caching=False, additional_config=loopus
    )
    answers = answers_alone(alone, items)
    alone.llm_engine.engine_core.shutdown()
    tiny = LLM(str(GOLDEN / "qwen3"), **OPTIONS, **TINY, additional_config=loopus)
    report = soak(tiny, items, answers, 60 * options.minutes, options.seed)
    tiny.llm_engine.engine_core.shutdown()
    print(report)
    if not report.good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
