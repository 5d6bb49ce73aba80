"""vLLM at a fixed recursion budget against the original implementation, in float32."""

from typing import Any

import pytest

from tests.conftest import BACKBONES, GOLDEN, counter, fixed_depth_cases

BUDGETS = (8, 5, 1)
LONG = 40  # tokens, so that every sequence grows over a block boundary
CERTAIN = 1e-4  # a smaller gap between the best two logits may fall either way

every = pytest.mark.parametrize(
    "setting", [(b, n) for b in BACKBONES for n in BUDGETS], ids=lambda p: f"{p[0]}-{p[1]}"
)
# The other budgets go through chunks, hits and preemption in test_early_exit.py.
middle = pytest.mark.parametrize("setting", [(b, 5) for b in BACKBONES], ids=lambda p: p[0])


def start(make_llm: Any, setting: tuple[str, int], **engine_args: Any) -> Any:
    backbone, max_loops = setting
    return make_llm(
        GOLDEN / backbone,
        hf_overrides={"max_loops": max_loops, "exit_threshold": 2.0},
        skip_tokenizer_init=True,
        logprobs_mode="raw_logits",
        disable_log_stats=False,
        **engine_args,
    )


def generate(llm: Any, prompts: list[list[int]], max_tokens: int = 20) -> list[Any]:
    """The completions of the prompts, one batch; their logprobs hold raw logits."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=5
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def assert_same(candidate: Any, reference: Any) -> None:
    """Same tokens, up to the first one that is a toss-up for the reference."""
    for index, (token, expected) in enumerate(
        zip(candidate.token_ids, reference.token_ids, strict=True)
    ):
        best, second = sorted(x.logprob for x in reference.logprobs[index].values())[:-3:-1]
        if best - second < CERTAIN:
            return
        assert token == expected, f"token {index}"


@every
def test_alone_and_in_one_batch(make_llm: Any, setting: tuple[str, int]) -> None:
    llm = start(make_llm, setting, enable_prefix_caching=False)
    cases = fixed_depth_cases(*setting)
    assert len(cases) == 4
    batch = generate(llm, [case["prompt"] for case in cases])
    for case, together in zip(cases, batch, strict=True):
        (alone,) = generate(llm, [case["prompt"]])
        assert list(alone.token_ids) == case["tokens"]
        assert list(together.token_ids) == case["tokens"]
        logits = {token: x.logprob for token, x in alone.logprobs[0].items()}
        for token, expected in case["first_logits_top5"].items():
            assert logits[int(token)] == pytest.approx(expected, abs=1e-3)


@middle
def test_chunks_and_prefix_hits(make_llm: Any, setting: tuple[str, int]) -> None:
    llm = start(make_llm, setting, max_num_batched_tokens=16, max_num_seqs=8)
    cases = fixed_depth_cases(*setting)
    for case, output in zip(cases, generate(llm, [c["prompt"] for c in cases]), strict=True):
        assert list(output.token_ids) == case["tokens"]
    # More than a block of prompt: the golden prompt and all of its answer but the last token.
    case = max(cases, key=lambda case: len(case["prompt"]))
    prompt = case["prompt"] + case["tokens"][:-1]
    assert len(prompt) > 32
    hits = []
    for _ in range(4):
        (output,) = generate(llm, [prompt], max_tokens=1)
        assert list(output.token_ids) == case["tokens"][-1:]
        hits.append(counter(llm, "vllm:prefix_cache_hits"))
    assert hits[3] - hits[0] == 3 * 32


@middle
def test_preemption(make_llm: Any, setting: tuple[str, int]) -> None:
    max_loops = setting[1]
    cases = fixed_depth_cases(*setting)
    prompts = [case["prompt"] for case in cases]
    reference = generate(start(make_llm, setting, enable_prefix_caching=False), prompts, LONG)
    # Room for every prompt, but not for what the sequences grow to; one block is vLLM's own.
    blocks = sum(-(-len(prompt) // 32) for prompt in prompts) * max_loops + 1
    llm = start(make_llm, setting, max_model_len=96, num_gpu_blocks_override=blocks)
    outputs = generate(llm, prompts, LONG)
    assert counter(llm, "vllm:num_preemptions") > 0
    for case, output, expected in zip(cases, outputs, reference, strict=True):
        assert list(output.token_ids[:20]) == case["tokens"]
        assert_same(output, expected)
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == blocks - 1
