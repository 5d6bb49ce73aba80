"""Quantised K/V: answers are those of the reference model with rounded K/V, in whatever way they
are computed; no NaN is left in a page."""

from typing import Any

import pytest
import torch

from tests.conftest import BACKBONES, GOLDEN, admit_too_many, counter, fixed_depth_cases, kv_manager
from tests.serving.test_early_exit import LONG, MIXED, SCARCE, by_rule, generate, params_of, start
from vllm_loopus import exit_depths
from vllm_loopus.bench.kv_reference import KVReference, KVSetting
from vllm_loopus.serving.model.kv_dtype import KV_DTYPES, floats_in, kv_bytes
from vllm_loopus.serving.worker.nonfinite import cleanse
from vllm_loopus.serving.worker.states import StatePages

BLOCK = 32
FEW = {"num_gpu_blocks_override": 8 * 3 + 1}
# Products of matrices differ by rounding between a batch and one sequence, and K/V near the middle
# between two fp8 numbers turns that into one of their steps. Such answers may differ where the best
# two tokens are this close.
CERTAIN = 0.05
QUICK = [("qwen3", "fp8")]
SLOW = [(b, d) for b in BACKBONES for d in ("fp8", "fp8_e5m2") if (b, d) not in QUICK]


def quick_and(slow: list[Any], quick: list[Any]) -> list[Any]:
    return [*quick, *(pytest.param(*values, marks=pytest.mark.long) for values in slow)]


@pytest.mark.parametrize(("backbone", "kv_dtype"), quick_and(SLOW, QUICK))
def test_answers_are_those_of_rounded_kv(make_llm: Any, backbone: str, kv_dtype: str) -> None:
    knobs = {"max_loops": 5, "exit_threshold": 2.0}
    reference = KVReference.of(GOLDEN / backbone, KVSetting(kv_dtype), **knobs)
    llm = make_llm(
        GOLDEN / backbone,
        hf_overrides=knobs,
        skip_tokenizer_init=True,
        logprobs_mode="raw_logits",
        kv_cache_dtype=kv_dtype,
    )
    cases = fixed_depth_cases(backbone, 5)
    for case, output in zip(cases, generate(llm, cases, logprobs=5), strict=True):
        tokens, _, gaps = reference.continued(case["prompt"], 20)
        with torch.inference_mode():
            logits = reference(torch.tensor([case["prompt"]]), logits_to_keep=1).logits[0, -1]
        for token, found in output.logprobs[0].items():
            assert found.logprob == pytest.approx(logits[token].item(), abs=5e-3)
        unclear = next((i for i, gap in enumerate(gaps) if gap < CERTAIN), len(tokens))
        assert list(output.token_ids[:unclear]) == tokens[:unclear]


def assert_same(outputs: list[Any], expected: list[Any]) -> None:
    """Equal tokens and exit depths, up to the first token that is a toss-up."""
    for output, other in zip(outputs, expected, strict=True):
        best = [sorted((x.logprob for x in at.values()), reverse=True) for at in other.logprobs]
        unclear = next((i for i, b in enumerate(best) if b[0] - b[1] < CERTAIN), len(best))
        assert output.token_ids[:unclear] == other.token_ids[:unclear]
        assert exit_depths(output)[:unclear] == exit_depths(other)[:unclear]


@pytest.mark.parametrize(
    "setting",
    quick_and([(setting,) for setting in MIXED[1:]], MIXED[:1]),
    ids=lambda setting: setting[0],
)
def test_alone_in_chunks_from_hits_and_preempted(make_llm: Any, setting: Any) -> None:
    every = by_rule(setting[0])[setting[1]]
    cases = every[:: len(every) // 5][:5]
    asked = {"max_tokens": LONG, "logprobs": 2}
    llm = start(make_llm, setting, kv_cache_dtype="fp8", enable_prefix_caching=False)
    expected = [generate(llm, [case], **asked)[0] for case in cases]
    assert len({depth for output in expected for depth in exit_depths(output)}) > 2
    assert_same(generate(llm, cases, **asked), expected)

    llm = start(make_llm, setting, kv_cache_dtype="fp8", max_num_batched_tokens=16, max_num_seqs=8)
    assert_same(generate(llm, cases, **asked), expected)
    hits = counter(llm, "vllm:prefix_cache_hits")
    longer = [[*case["prompt"], *o.token_ids[:33]] for case, o in zip(cases, expected, strict=True)]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in longer],
        [params_of(case, max_tokens=LONG - 33, logprobs=2) for case in cases],
        use_tqdm=False,
    )
    assert counter(llm, "vllm:prefix_cache_hits") - hits >= 32 * len(cases)
    for output, other in zip(outputs, expected, strict=True):
        best = [sorted((x.logprob for x in at.values()), reverse=True) for at in other.logprobs]
        if all(b[0] - b[1] >= CERTAIN for b in best):
            assert output.outputs[0].token_ids == other.token_ids[33:]

    llm = start(make_llm, setting, {"exit_quorum": 0.05}, kv_cache_dtype="fp8", **{**SCARCE, **FEW})
    admit_too_many(llm)
    assert_same(generate(llm, 2 * cases, **asked), 2 * expected)
    assert counter(llm, "vllm:num_preemptions") > 0
    pool = kv_manager(llm).block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_the_kernels_of_vllm_still_cut_off() -> None:
    """When this fails, `round_fp8` can go."""
    from vllm import _custom_ops as ops

    cache = torch.zeros(1, 1, 2 * BLOCK, 32, dtype=torch.uint8)
    key_cache, value_cache = cache.chunk(2, dim=2)
    numbers = torch.full((1, 1, 32), 1.12)
    ops.cpu_attn_reshape_and_cache(
        numbers, numbers, key_cache, value_cache, torch.tensor([0]), "vec",
        k_scale=1.0, v_scale=1.0, kv_cache_dtype="fp8",
    )  # fmt: skip
    assert value_cache.view(torch.float8_e4m3fn)[0, 0, 0, 0].item() == 1.0  # not 1.125


def page_of(kv_dtype: str, blocks: int = 3, heads: int = 2, head_size: int = 32) -> torch.Tensor:
    """The page of a layer, as vLLM shapes it, full of ones."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    dtype = kv_cache_dtype_str_to_dtype(kv_dtype, None)
    width = kv_bytes(heads, head_size, kv_dtype, dtype.itemsize) // heads // dtype.itemsize
    return torch.ones(blocks, heads, BLOCK, width, dtype=dtype)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_no_nan_is_left(kv_dtype: str) -> None:
    page = page_of(kv_dtype)
    views = floats_in(page, kv_dtype)
    clean = page.view(torch.uint8).clone()
    for numbers in views:
        numbers.view(torch.uint8)[1:, :, 3] = 255  # NaN in all of them
    assert not all(numbers.float().isfinite().all() for numbers in views)
    cleanse(views, torch.tensor([1]).numpy())
    for numbers in views:
        assert numbers[1].float().isfinite().all() and not numbers[2].float().isfinite().all()
    after = page.view(torch.uint8)
    assert torch.equal(after[0], clean[0])
    assert torch.equal(after[1, :, 4:], clean[1, :, 4:])


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8_per_token_head", "int4_per_token_head"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_keep_their_dtype(kv_dtype: str, dtype: torch.dtype) -> None:
    pages = [page_of(kv_dtype) for _ in range(5)]
    states, slots = torch.randn(4, 64).to(dtype), torch.tensor([95, 0, 33, 64])
    a_row = kv_bytes(2, 32, kv_dtype, 1)
    pages = pages[: -(-states[0].nbytes // a_row)]
    found = StatePages(pages, 64, dtype)
    found.write(slots, states)
    assert torch.equal(found.read(slots), states)
