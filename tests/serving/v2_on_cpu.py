"""vLLM's own V2 model runner on a CPU: Triton's kernels interpreted. A program, not a test.

    pip install --no-deps --target /tmp/triton triton==3.6.0
    PYTHONPATH=/tmp/triton:. python -m tests.serving.v2_on_cpu

Answers of the loop must be the golden ones, with chunks, preemptions, seeds and scores of
prompts. It works on what vLLM would call a Triton without a CPU backend: the interpreter.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    TRITON_INTERPRET="1",
    VLLM_USE_V2_MODEL_RUNNER="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)


class _AlwaysActive:
    @staticmethod
    def is_active() -> bool:
        return True


def pretend_a_cpu_backend() -> None:
    """vLLM for CPUs takes Triton with a CPU backend only; the interpreter needs none."""
    from triton.backends import Backend, backends

    backend = Backend.__new__(Backend)
    object.__setattr__(backend, "compiler", object)
    object.__setattr__(backend, "driver", _AlwaysActive)
    backends["cpu"] = backend


def main() -> None:
    pretend_a_cpu_backend()
    from vllm import LLM, SamplingParams

    from tests.conftest import GOLDEN, golden_cases, runner_of
    from vllm_loopus import exit_depths

    cases = [
        c
        for c in golden_cases("qwen3")
        if c["halting_strategy"] == "threshold" and c["q_eval_interval"] == 1 and c["N"] == 8
    ][:8]
    llm = LLM(
        str(GOLDEN / "qwen3"),
        dtype="float32",
        max_model_len=128,
        block_size=32,
        skip_tokenizer_init=True,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        num_gpu_blocks_override=41,
        disable_log_stats=False,
    )
    runner = runner_of(llm)

    def sampling(case: dict[str, Any], **more: Any) -> Any:
        defaults = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
        knobs = {"exit_threshold": case["q_threshold"]}
        return SamplingParams(**{**defaults, "extra_args": knobs, **more})

    def run(params: list[Any]) -> list[Any]:
        prompts = [{"prompt_token_ids": c["prompt"]} for c in cases]
        return llm.generate(prompts, params, use_tqdm=False)

    outputs = run([sampling(c, prompt_logprobs=1) for c in cases])
    seeded = [sampling(c, temperature=1.0, seed=i) for i, c in enumerate(cases)]
    drawn = [[list(o.outputs[0].token_ids) for o in run(seeded)] for _ in range(2)]
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    result = {
        "runner": [kind.__name__ for kind in type(runner).__mro__[:3]],
        "golden": [
            list(o.outputs[0].token_ids) == c["tokens"] and exit_depths(o) == c["depths"]
            for c, o in zip(cases, outputs, strict=True)
        ],
        "prompts_scored": [
            len(o.prompt_logprobs) == len(c["prompt"]) for c, o in zip(cases, outputs, strict=True)
        ],
        "first_scores": [[lp.logprob for lp in o.prompt_logprobs[1].values()] for o in outputs],
        "seeds_repeat": drawn[0] == drawn[1] and drawn[0] != [c["tokens"] for c in cases],
        "preemptions": preemptions,
    }
    text = json.dumps(result)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
