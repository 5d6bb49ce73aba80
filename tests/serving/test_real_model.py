"""A real language model: tokens and exit depths of the engine are the reference's, on real prompts.

With the model of `make smollm2`, or the one in VLLM_LOOPUS_REAL_MODEL. `make test-long`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.conftest import admit_too_many, counter
from vllm_loopus import exit_depths
from vllm_loopus.cli.info import estimate_kv
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.model import LoopUSForCausalLM

FOLDER = Path(os.environ.get("VLLM_LOOPUS_REAL_MODEL", "runs/smollm2/looped/model"))
CERTAIN = 1e-3  # a smaller margin may fall either way
NEW_TOKENS = 6
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain 🌧️ and tea.",
    "Translate to German: good morning, my friend.",
    "def add(a, b):\n    return",
    "The quick brown fox jumps over the lazy dog. Repeat it.",
    "List three colours:\n1.",
)
# Knobs that differ between requests, around the confidence of a model that was little trained.
KNOBS = (
    {},
    {"exit_threshold": 0.2},
    {"exit_threshold": 0.35, "max_loops": 3},
    {"min_loops": 2, "exit_threshold": 0.1},
    {"max_loops": 1},
    {"exit_threshold": 0.5, "max_loops": 4},
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.engine,
    pytest.mark.skipif(
        not (FOLDER / "config.json").is_file(),
        reason=f"{FOLDER} is not there: run make smollm2 SIZE=test, or name a LoopUS model in "
        "VLLM_LOOPUS_REAL_MODEL",
    ),
]


@dataclass
class Case:
    prompts: list[list[int]]
    expected: Callable[[int], tuple[list[int], list[int], int]]


@pytest.fixture(scope="module")
def case() -> Case:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = LoopUSForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                tokenize=False,
            ),
            add_special_tokens=False,
        )["input_ids"]
        for question in QUESTIONS
    ]

    @cache
    @torch.no_grad()
    def expected(index: int) -> tuple[list[int], list[int], int]:
        """Tokens and depths of a prompt with its knobs, and how many of them are certain."""
        served = dict(model.config.to_dict())
        model.config.update(KNOBS[index])
        if model.config.min_loops > model.config.max_loops:
            model.config.min_loops = model.config.max_loops
        tokens, depths, certain = list(prompts[index]), [], 0
        sure = True
        for _ in range(NEW_TOKENS):
            output = model(torch.tensor([tokens]), logits_to_keep=1, output_states=True)
            best, second = output.logits[0, -1].topk(2).values
            margins = [abs(q.item() - model.config.exit_threshold) for q in output.confidences]
            sure = sure and bool(best - second > CERTAIN) and min(margins) > CERTAIN
            tokens.append(int(output.logits[0, -1].argmax()))
            depths.append(int(output.exit_depths[0]))
            certain += sure
        names = ("max_loops", "min_loops", "exit_threshold")
        model.config.update({name: served[name] for name in names})
        return tokens[len(prompts[index]) :], depths, certain

    return Case(prompts, expected)


def agree(case: Case, outputs: list[Any], indices: list[int]) -> None:
    """All tokens and depths up to the first that rounding may decide."""
    compared = 0
    for index, output in zip(indices, outputs, strict=True):
        tokens, depths, certain = case.expected(index)
        completion = output.outputs[0]
        assert list(completion.token_ids)[:certain] == tokens[:certain], QUESTIONS[index]
        assert exit_depths(output)[:certain] == depths[:certain], QUESTIONS[index]
        compared += certain
    assert compared > len(indices) * NEW_TOKENS // 2, "too few are certain"


def generate(llm: Any, case: Case, indices: list[int]) -> list[Any]:
    from vllm import SamplingParams

    return llm.generate(
        [{"prompt_token_ids": case.prompts[index]} for index in indices],
        [
            SamplingParams(
                temperature=0,
                max_tokens=NEW_TOKENS,
                ignore_eos=True,
                detokenize=False,
                extra_args=dict(KNOBS[index]) or None,
            )
            for index in indices
        ],
        use_tqdm=False,
    )


def bytes_for(tokens: int) -> int:
    """K/V memory for so many tokens at full depth."""
    estimate = estimate_kv(LoopUSConfig.from_pretrained(FOLDER), 1, dtype="float32")
    return tokens * max(estimate.bytes_a_token.values())


def test_a_batch_in_chunks_with_prefix_hits(case: Case, make_llm: Any) -> None:
    """Own knobs, prompts in chunks of 16, then once more in another order from the prefix cache."""
    llm = make_llm(
        FOLDER,
        max_num_batched_tokens=16,
        max_num_seqs=4,
        max_model_len=256,
        kv_cache_memory_bytes=bytes_for(1024),
    )
    everything = list(range(len(QUESTIONS)))
    agree(case, generate(llm, case, everything), everything)
    again = generate(llm, case, everything[::-1])
    agree(case, again, everything[::-1])
    assert any(output.num_cached_tokens for output in again)


def test_preempted(case: Case, make_llm: Any) -> None:
    """A pool of two short sequences at full depth, and six that want to run."""
    llm = make_llm(
        FOLDER,
        max_num_seqs=6,
        max_model_len=128,
        kv_cache_memory_bytes=bytes_for(136),
        disable_log_stats=False,
    )
    admit_too_many(llm)
    everything = list(range(len(QUESTIONS)))
    agree(case, generate(llm, case, everything), everything)
    assert counter(llm, "vllm:num_preemptions") > 0
