"""Speed against quality: `loopus-tiny`'s questions on our engine, by exit threshold."""

from statistics import median
from typing import Any

from transformers import AutoTokenizer

from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.bench.fleet import EngineSpec, Fleet
from vllm_loopus.bench.setup import GPU_SHARE, Setup
from vllm_loopus.bench.workloads import Request, Workload
from vllm_loopus.tiny.evaluate import SEED, THRESHOLDS, standard_error
from vllm_loopus.tiny.tasks import evaluation_set

MODEL, MAX_LOOPS, SEQS = "loopus-tiny", 8, 64
OFF = "off"


def measure(setup: Setup) -> dict[str, Any]:
    """An answer is one token, so a question costs its prompt's passes."""
    items = evaluation_set(SEED, setup.plan.quality_items)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED[MODEL])
    right = [tokenizer.encode(item.answer)[0] for item in items]
    requests = [Request(tokenizer.encode(item.question), 1) for item in items]
    work = Workload(MODEL, requests)
    settings: dict[str, dict[str, Any]] = {OFF: {"min_loops": MAX_LOOPS}}
    settings |= {str(t): {"exit_threshold": t} for t in THRESHOLDS}
    # `auto`: the checkpoint's dtype, its answers are wanted as they are served.
    options: dict[str, Any] = {
        "max_num_seqs": SEQS,
        "max_model_len": 256,
        "kv_cache_memory_bytes": 2**29,
    }
    if setup.device == "cuda":
        options["gpu_memory_utilization"] = GPU_SHARE
    spec = EngineSpec(MODEL, "ours", EMBEDDED[MODEL], {}, options)
    with Fleet([spec], setup.folder) as fleet:
        fleet.warm_up(work.without_exits(**settings[OFF]))
        rows = {
            name: _row(fleet, work.without_exits(**knobs), right)
            for name, knobs in settings.items()
        }
        rates: dict[str, list[float]] = {name: [row.pop("rate")] for name, row in rows.items()}
        for _ in range(setup.plan.rounds - 1):
            for name in reversed(settings):
                found = fleet.run(MODEL, work.without_exits(**settings[name]))
                rates[name].append(found["tokens"] / found["seconds"])
        about = fleet.about[MODEL]
    for name, row in rows.items():
        row["answers_a_second"] = median(rates[name])
    return {"about": about, "questions": len(items), "settings": rows}


def _row(fleet: Fleet, work: Workload, right: list[int]) -> dict[str, Any]:
    found = fleet.run(MODEL, work, answers=True)
    count = len(right)
    hits = sum(answer[0] == token for answer, token in zip(found["answers"], right, strict=True))
    depths = found["exit_depths"]
    return {
        "rate": found["tokens"] / found["seconds"],
        "accuracy": hits / count,
        "standard_error": standard_error(hits / count, count),
        "mean_depth": sum(int(depth) * n for depth, n in depths.items()) / count,
    }
