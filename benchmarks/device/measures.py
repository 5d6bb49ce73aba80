"""The measurements behind `checks.py`: golden answers, and passes of the reasoning block.

    python benchmarks/device/measures.py golden --dtype float32 --write FILE
    python benchmarks/device/measures.py passes --write FILE

Exits with 1 where what must hold does not.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Without a process of its own for the engine: its parts are looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
CLOSE = {"float32": 1e-3, "bfloat16": 0.5}  # of raw logits of the first token, at fixed depth
SIZES = "1,2,4,8,16,32,64,128,256"
MODEL = {
    "model_type": "loopus",
    "architectures": ["LoopUSForCausalLM"],
    "base_config": {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "encoder_layer_indices": list(range(4)),
    "reasoning_layer_indices": list(range(4, 24)),
    "decoder_layer_indices": list(range(24, 28)),
    "max_loops": 8,
}


def engine(model: str, graphs: bool, **options: Any) -> Any:
    """An engine of this process; with graphs, or on a CPU with padded rows in their stead."""
    from vllm import LLM

    if graphs and torch.cuda.is_available():
        sizes = [int(size) for size in SIZES.split(",")]
        options["compilation_config"] = {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": sizes}
    elif graphs:
        os.environ["VLLM_LOOPUS_PADDED_ROWS"] = SIZES
    return LLM(model, skip_tokenizer_init=True, **options)


def golden(dtype: str, cases: int | None, graphs: bool) -> tuple[bool, dict[str, Any]]:
    """Tokens and exit depths of the original implementation. In float32 all must be equal; in
    bfloat16 the first token's logits must be close, and shares of equal tokens are reported."""
    from vllm import SamplingParams

    from vllm_loopus import exit_depths

    expected = [
        case
        for case in json.loads((GOLDEN / "qwen3" / "expected.json").read_text())["cases"]
        if case["halting_strategy"] == "threshold" and case["q_eval_interval"] == 1
    ][:cases]
    llm = engine(
        str(GOLDEN / "qwen3"),
        graphs,
        dtype=dtype,
        max_model_len=128,
        block_size=32,
        logprobs_mode="raw_logits",
    )
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=len(case["tokens"]),
            ignore_eos=True,
            detokenize=False,
            logprobs=5,
            extra_args={"max_loops": case["N"], "exit_threshold": case["q_threshold"]},
        )
        for case in expected
    ]
    prompts = [{"prompt_token_ids": case["prompt"]} for case in expected]
    answers = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    pairs = list(zip(expected, answers, strict=True))
    tokens = [list(a.token_ids) == c["tokens"] for c, a in pairs]
    depths = [exit_depths(a) == c["depths"] for c, a in pairs]
    first = [a.token_ids[0] == c["tokens"][0] for c, a in pairs]
    apart = [
        abs(answer.logprobs[0][int(token)].logprob - value)
        for case, answer in pairs
        if case["q_threshold"] >= 1
        for token, value in case.get("first_logits_top5", {}).items()
        if int(token) in answer.logprobs[0]
    ]
    worst = max(apart, default=0.0)
    result = {
        "cases": len(pairs),
        "equal_tokens": sum(tokens) / len(pairs),
        "equal_depths": sum(depths) / len(pairs),
        "equal_first_tokens": sum(first) / len(pairs),
        "logits_compared": len(apart),
        "worst_logit_difference": worst,
        "graphs": graphs,
        "attention": backend(llm),
    }
    exact = dtype != "float32" or (all(tokens) and all(depths))
    return exact and worst <= CLOSE[dtype], result


def passes(rows: list[int], tiny: bool, compiled: bool) -> tuple[bool, dict[str, Any]]:
    """Milliseconds of a pass by rows, as it is and as a graph, beside the time to read the block's
    weights once; both must give the same states. `compiled`: and under `torch.compile`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        model = str(GOLDEN / "qwen3") if tiny else folder
        llm = engine(
            model,
            graphs=True,
            dtype="float32" if tiny else "bfloat16",
            max_model_len=128 if tiny else 1024,
            load_format="auto" if tiny else "dummy",
            max_num_seqs=max(rows),
        )
    runner = runner_of(llm)
    bandwidth = copy_bandwidth(runner.device, tiny)
    weights = reasoning_bytes(runner.vllm_config.model_config)
    floor = weights / bandwidth
    measured, same = [], True
    for count in rows:
        eager, graph, difference = one_size(runner, count, repeats=3 if tiny else 30)
        same &= difference <= (1e-5 if tiny else 5e-2)
        measured.append(
            {
                "rows": count,
                "eager_ms": 1e3 * eager,
                "graph_ms": 1e3 * graph,
                "graph_over_floor": graph / floor,
                "worst_difference": difference,
            }
        )
    if compiled:
        runner.get_model().reasoning.compile(dynamic=True)
        for entry in measured:
            one_size(runner, entry["rows"], repeats=1)  # compiles
            seconds = one_size(runner, entry["rows"], repeats=3 if tiny else 30)[0]
            entry["compiled_ms"] = 1e3 * seconds
    return same, {
        "captured": torch.cuda.is_available(),
        "weights_mib": weights / 2**20,
        "bandwidth_gib_s": bandwidth / 2**30,
        "floor_ms": 1e3 * floor,
        "attention": backend(llm),
        "passes": measured,
    }


@torch.inference_mode()
def one_size(runner: Any, count: int, repeats: int) -> tuple[float, float, float]:
    """Seconds of a pass of `count` sequences, a row each, as it is and as a graph, and how far
    their states are apart."""
    from vllm_loopus.serving.step.chunks import Chunks

    tables, region = runner._sequences._tables, runner._sequences._executor._regions.reasoning
    config, length = runner.vllm_config.model_config, 96
    blocks = -(-length // tables.block_size)
    depths = range(config.hf_config.max_loops)
    tables.reserve(count)
    for index in range(count):
        own = list(range(1 + index * blocks, 1 + (index + 1) * blocks))
        tables.add(index, [own for _ in depths], 0)
    every = np.ones(count, dtype=np.int64)
    layout = tables.layout(
        Chunks(np.arange(count), 2 * every, (length - 1) * every, length * every, every > 0)
    )
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(count, config.get_hidden_size(), generator=generator)
    state = state.to(runner.device, config.dtype)
    found = {}
    padding = region._padding
    for name, use in (("eager", None), ("graph", padding)):
        region._padding = use
        outputs = [output.clone() for output in region(layout, state, None, None).outputs]
        found[name] = (
            timed(lambda: region(layout, state, None, None), repeats, runner.device),
            outputs,
        )
    region._padding = padding
    apart = max(
        float((one.float() - other.float()).abs().max())
        for one, other in zip(found["eager"][1], found["graph"][1], strict=True)
    )
    return found["eager"][0], found["graph"][0], apart


def reasoning_bytes(model_config: Any) -> int:
    """Of the reasoning block's weights; the backend of CPUs keeps packed ones out of sight."""
    from vllm_loopus.modeling.model import expected_shapes

    shapes = expected_shapes(model_config.hf_config)
    numbers = sum(math.prod(s) for name, s in shapes.items() if name.startswith("reasoning."))
    return numbers * model_config.dtype.itemsize


def timed(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of a call, the median."""
    seconds = []
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[repeats // 2]


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes a second that memory reads and writes in a copy."""
    source = torch.zeros((2**24 if tiny else 2**30) // 4, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), 5, device)
    return 2 * source.numel() * source.element_size() / seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def backend(llm: Any) -> str:
    return str(runner_of(llm).attn_groups[0][0].backend.get_name())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("golden", "passes"))
    parser.add_argument("--dtype", choices=tuple(CLOSE), default="float32")
    parser.add_argument("--cases", type=int, help="golden cases at most")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    parser.add_argument("--write", type=Path, required=True)
    given = parser.parse_args()
    if given.what == "golden":
        holds, result = golden(given.dtype, given.cases, given.graphs)
    else:
        holds, result = passes(given.rows, given.tiny, given.compiled)
    given.write.write_text(json.dumps(result))
    print(json.dumps(result, indent=1))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
