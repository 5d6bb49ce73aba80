"""Policy `last_exited`: one row a token and depth; K/V that depends on the knobs is not shared."""

from typing import Any

import pytest

from tests.conftest import BACKBONES, GOLDEN, counter, golden_cases, spy_on_steps
from vllm_loopus import exit_depths


def start(
    make_llm: Any, backbone: str, policy: str = "last_exited", prefill: str = "lazy", **args: Any
) -> Any:
    return make_llm(
        GOLDEN / backbone,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        additional_config={"loopus": {"kv_policy": policy, "prefill_depth": prefill}},
        **args,
    )


def generate(llm: Any, prompts: list[list[int]], knobs: list[dict[str, Any]]) -> list[Any]:
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            extra_args=k,
        )
        for k in knobs
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_golden_where_all_tokens_leave_at_one_depth(make_llm: Any, backbone: str) -> None:
    """Then nothing is taken over that would have been computed otherwise."""
    cases = [c for c in golden_cases(backbone) if len(set(c["depths"])) == 1]
    assert len({c["depths"][0] for c in cases}) > 1
    llm = start(make_llm, backbone)
    outputs = generate(
        llm, [c["prompt"] for c in cases], [{"exit_depths": c["depths"]} for c in cases]
    )
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.token_ids) == case["tokens"]
        assert exit_depths(output) == case["depths"]


def test_alone_as_in_a_batch_and_one_row_a_token(make_llm: Any) -> None:
    llm = start(make_llm, "phi3", enable_prefix_caching=False)
    cases = [c for c in golden_cases("phi3") if len(set(c["depths"])) > 2][:6]
    knobs = [{"max_loops": c["N"], "exit_threshold": c["q_threshold"]} for c in cases]
    steps = spy_on_steps(llm)
    alone = []
    for case, knob in zip(cases, knobs, strict=True):
        steps.clear()
        alone += generate(llm, [case["prompt"]], [knob])
        depths = exit_depths(alone[-1])
        # The prompt goes as deep as any token, in passes of theirs; each token after it is one row
        # a depth.
        assert max(depths[1:]) > depths[0] or case is not cases[0]
        rows = len(case["prompt"]) * max(depths) + sum(depths[1:])
        assert sum(n for step in steps for n in step.passes) == rows
        assert sum(len(step.passes) for step in steps) == sum(depths)
    together = generate(llm, [c["prompt"] for c in cases], knobs)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert exit_depths(one) == exit_depths(other)


def test_deeper_planes_are_written_once_a_token_has_left(
    make_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the head's word or by given depths; not in every pass in which it might have."""
    from vllm_loopus.serving.model.deferred_writes import DeferredWrites

    slots: list[int] = []
    write = DeferredWrites.write

    def counted(writes: Any, rows: Any, to: Any) -> None:
        slots.append(len(to))
        write(writes, rows, to)

    monkeypatch.setattr(DeferredWrites, "write", counted)
    llm = start(make_llm, "phi3", enable_prefix_caching=False)
    cases = [c for c in golden_cases("phi3") if len(set(c["depths"])) > 2][:6]
    heads = [{"max_loops": c["N"], "exit_threshold": c["q_threshold"]} for c in cases]
    given = [{"max_loops": c["N"], "exit_depths": c["depths"]} for c in cases]
    for knobs in (heads, given):
        slots.clear()
        outputs = generate(llm, [c["prompt"] for c in cases], knobs)
        # The first token is the prompt's own.
        assert sum(slots) == sum(
            case["N"] - depth
            for case, output in zip(cases, outputs, strict=True)
            for depth in exit_depths(output)[1:]
        )
        assert sum(slots) > 0


def test_prompts_that_follow_a_token_are_as_if_they_had_gone_first(make_llm: Any) -> None:
    cases = [c for c in golden_cases("llama") if max(c["depths"][1:]) > c["depths"][0]][:8]
    knobs = [{"exit_depths": case["depths"]} for case in cases]
    lazy, full = (
        generate(start(make_llm, "llama", prefill=prefill), [c["prompt"] for c in cases], knobs)
        for prefill in ("lazy", "full")
    )
    for one, other in zip(lazy, full, strict=True):
        assert one.token_ids == other.token_ids
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)


def test_it_is_an_approximation(make_llm: Any) -> None:
    """Otherwise the policy would not have been in force."""
    prompt = golden_cases("qwen3")[2]["prompt"]
    knobs = [{"exit_depths": [1, 8, 1, 1, 8, 1, 1, 1, 8, 1, 1, 8, 1, 1, 8, 1, 1, 8, 8, 8]}]
    taken = generate(start(make_llm, "qwen3"), [prompt], knobs)[0]
    exact = generate(start(make_llm, "qwen3", "exact"), [prompt], knobs)[0]
    assert taken.token_ids[0] == exact.token_ids[0]
    assert taken.token_ids != exact.token_ids


def test_blocks_are_shared_between_equal_knobs_only(make_llm: Any) -> None:
    llm = start(make_llm, "qwen3")
    prompt = max((c["prompt"] for c in golden_cases("qwen3")), key=len)
    assert len(prompt) > 32
    for knobs, expected in (
        ({"max_loops": 4}, 0),
        ({"max_loops": 5}, 0),
        ({"max_loops": 4, "exit_threshold": 0.3}, 0),
        ({"max_loops": 4}, 32),
        ({}, 0),
        ({"min_loops": 1}, 32),  # the default, said aloud
    ):
        before = counter(llm, "vllm:prefix_cache_hits")
        generate(llm, [prompt], [knobs])
        assert counter(llm, "vllm:prefix_cache_hits") - before == expected, knobs


def test_preemption_finishes(make_llm: Any) -> None:
    llm = start(make_llm, "llama", num_gpu_blocks_override=4 * 8 + 1, max_num_seqs=8)
    cases = golden_cases("llama")[:8]
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
    outputs = llm.generate(
        [{"prompt_token_ids": c["prompt"]} for c in cases], sampling, use_tqdm=False
    )
    assert all(len(o.outputs[0].token_ids) == 60 for o in outputs)
    assert counter(llm, "vllm:num_preemptions") > 0
