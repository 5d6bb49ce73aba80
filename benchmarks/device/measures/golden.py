"""Golden answers: tokens and exit depths of the original implementation, float32, early exit.

    python -m measures.golden --backbone qwen3

All must be equal, in one batch whose requests have different knobs. `--graphs`: with CUDA graphs.
`--v2`: on vLLM's V2 model runner.
"""

import json
import os
from typing import Any

import torch

from measures.engines import GIB, about, build, golden_folder
from measures.program import end, parser, saying

RUNNERS = {False: "V1Adapter", True: "V2Adapter"}


def cases(backbone: str, number: int | None) -> list[dict[str, Any]]:
    """Those that knobs of a request can ask for."""
    text = (golden_folder() / backbone / "expected.json").read_text()
    return [
        case
        for case in json.loads(text)["cases"]
        if case["halting_strategy"] == "threshold" and case["q_eval_interval"] == 1
    ][:number]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--backbone", choices=("qwen3", "llama", "phi3"), default="qwen3")
    options.add_argument("--graphs", action="store_true")
    options.add_argument("--v2", action="store_true")
    given = options.parse_args()
    if given.v2:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from vllm import SamplingParams

    from vllm_loopus import exit_depths

    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
    expected = cases(given.backbone, 3 if given.tiny else None)
    llm = build(
        golden_folder() / given.backbone,
        given.graphs,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=16,
        # Measures run side by side on one card; vLLM is not to take stock of its memory.
        kv_cache_memory_bytes=GIB // 8 if given.tiny else 2 * GIB,
        gpu_memory_utilization=0.1,
    )
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=len(case["tokens"]),
            ignore_eos=True,
            detokenize=False,
            extra_args={"max_loops": case["N"], "exit_threshold": case["q_threshold"]},
        )
        for case in expected
    ]
    prompts = [{"prompt_token_ids": case["prompt"]} for case in expected]
    outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    pairs = list(zip(expected, outputs, strict=True))
    tokens = [list(output.token_ids) == case["tokens"] for case, output in pairs]
    depths = [list(exit_depths(output)) == case["depths"] for case, output in pairs]
    wrong = [
        {"case": number, "expected": case["tokens"], "answer": list(output.token_ids)}
        for number, (case, output) in enumerate(pairs)
        if not (tokens[number] and depths[number])
    ]
    engine = about(llm)
    saying(given)(
        backbone=given.backbone,
        graphs=given.graphs,
        cases=len(pairs),
        equal_tokens=sum(tokens),
        equal_depths=sum(depths),
        first_wrong=wrong[:2],
        **engine,
    )
    as_asked = engine["padded"] == given.graphs and engine["runner"] == RUNNERS[given.v2]
    end(bool(pairs) and all(tokens) and all(depths) and as_asked)


if __name__ == "__main__":
    main()
