"""Builds an engine on the pretended GPU, Triton interpreted, and asks it golden questions.

    PRETEND_CUDA=1 TRITON_INTERPRET=1 PYTHONPATH=... python pretend/engine.py MODEL

Each line of JSON is a step that has been reached; the last one says where it ended and why. The
worker, the runner, attention and K/V writes are those of a GPU; so are the stand-ins for what is
compiled. The interpreter is slow: a minute.
"""

import json
import os
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measures.engines import about, build
from measures.golden import cases

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_FLASHINFER_SAMPLER="0")
CASES, TOKENS = 2, 3
STEPS = (
    ("vllm.v1.worker.gpu_worker:Worker.init_device", "the worker has its device"),
    ("vllm.v1.worker.gpu_worker:Worker.load_model", "the checkpoint is loaded"),
    ("vllm.v1.worker.gpu_worker:Worker.determine_available_memory", "a profiling run has ended"),
    ("vllm.v1.worker.gpu_worker:Worker.initialize_from_config", "K/V memory is there"),
    ("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", "the model is warm"),
)


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def announce(place: str, reached: str) -> None:
    """Says that a method has returned."""
    module, _, path = place.partition(":")
    kind, name = path.split(".")
    owner = getattr(import_module(module), kind)
    original = getattr(owner, name)

    def announced(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        say(reached=reached)
        return result

    setattr(owner, name, announced)


def golden(llm: Any) -> dict[str, Any]:
    """The first tokens of golden cases that exit at different depths, one batch: how many are as
    they should be."""
    from vllm import SamplingParams

    from vllm_loopus import exit_depths

    every = [case for case in cases(Path(sys.argv[1]).name, None) if len(set(depths_of(case))) > 1]
    expected = sorted(every, key=lambda case: sum(depths_of(case)))[:CASES]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"max_loops": case["N"], "exit_threshold": case["q_threshold"]},
        )
        for case in expected
    ]
    prompts: list[Any] = [{"prompt_token_ids": case["prompt"]} for case in expected]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    pairs = list(zip(expected, outputs, strict=True))
    return {
        "cases": len(pairs),
        "equal_tokens": sum(list(o.token_ids) == c["tokens"][:TOKENS] for c, o in pairs),
        "equal_depths": sum(list(exit_depths(o)) == depths_of(c) for c, o in pairs),
    }


def depths_of(case: dict[str, Any]) -> list[int]:
    """At which the tokens exit that are asked for."""
    return list(case["depths"][:TOKENS])


def main() -> int:
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker import gpu_worker

    topk_topp_sampler.HAS_TRITON = False  # its kernel does not run in the interpreter
    if find_spec("torchvision") is None:  # the machine has it; vLLM's warm-up imports vision models
        gpu_worker.kernel_warmup = lambda *_, **__: None
    for place, reached in STEPS:
        announce(place, reached)
    try:
        llm = build(
            Path(sys.argv[1]),
            graphs=False,
            dtype="float32",
            max_model_len=64,
            max_num_seqs=2,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=2**25,
        )
        say(reached="the engine is built")
        say(reached="answers", **golden(llm), **about(llm))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-5:]
        where = [f"{frame.filename.split('/')[-1]}:{frame.lineno} {frame.name}" for frame in frames]
        say(ended=f"{type(error).__name__}: {error}"[:500], where=where)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
