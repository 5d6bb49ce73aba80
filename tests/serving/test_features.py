"""vLLM's features with early exit: each answer equals the one the request gets alone."""

import re
import weakref
from typing import Any

import pytest
import torch

from tests.conftest import GOLDEN, golden_cases, runner_of
from vllm_loopus import LoopUSForCausalLM, exit_depths
from vllm_loopus.serving.knobs.engine import EngineOptions

KNOBS = {"exit_threshold": 0.6214}
PROMPTS = [case["prompt"] for case in golden_cases("qwen3")[:4]]


@pytest.fixture(scope="module")
def llm(make_llm: Any) -> Any:
    return make_llm(
        GOLDEN / "qwen3",
        skip_tokenizer_init=True,
        disable_log_stats=False,
        max_num_seqs=8,
        max_logprobs=20,
        additional_config={"loopus": {"exit_quorum": 0.05}},
    )


@pytest.fixture(scope="module")
def reference() -> Any:
    model = LoopUSForCausalLM.from_pretrained(GOLDEN / "qwen3", dtype=torch.float32)
    model.config.exit_threshold = KNOBS["exit_threshold"]
    return model.eval()


def params(**options: Any) -> Any:
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**defaults, "extra_args": KNOBS, **options})


def run(llm: Any, sampling: list[Any], prompts: list[list[int]] | None = None) -> list[Any]:
    prompts = prompts or [PROMPTS[i % len(PROMPTS)] for i in range(len(sampling))]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)


def same(first: Any, second: Any) -> None:
    for a, b in zip(first.outputs, second.outputs, strict=True):
        assert a.token_ids == b.token_ids
        assert exit_depths(a) == exit_depths(b)


OPTIONS = {
    "seed": {"temperature": 1.0, "seed": 7},
    "top-p and seed": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "min-p": {"temperature": 1.0, "min_p": 0.1, "seed": 11},
    "logit bias": {"logit_bias": {5: 3.0, 9: -4.0}},
    "bad words": {"_bad_words_token_ids": [[17], [30, 31]]},
    "min tokens": {"min_tokens": 5, "stop_token_ids": list(range(0, 512, 2)), "max_tokens": 16},
    "allowed tokens": {"allowed_token_ids": list(range(100, 200))},
    "budgets": {"extra_args": {"max_loops": 2}},
    "deep": {"extra_args": {"min_loops": 6, "exit_threshold": 0.1}},
}


def test_neighbours_do_not_matter(llm: Any) -> None:
    """Every option alone, then all in one batch, twice, in two orders."""
    sampling = [params(**options) for options in OPTIONS.values()]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(sampling))]
    alone = [run(llm, [s], [p])[0] for s, p in zip(sampling, prompts, strict=True)]
    assert len({tuple(output.outputs[0].token_ids) for output in alone}) > len(OPTIONS) // 2
    for order in (range(len(sampling)), reversed(range(len(sampling)))):
        indices = list(order)
        outputs = run(llm, [sampling[i] for i in indices], [prompts[i] for i in indices])
        for index, output in zip(indices, outputs, strict=True):
            same(output, alone[index])


def test_several_completions(llm: Any) -> None:
    sampling = params(n=3, temperature=1.0, seed=5)
    (alone,) = run(llm, [sampling], PROMPTS[:1])
    assert len({tuple(c.token_ids) for c in alone.outputs}) == 3
    together = run(llm, [params(), sampling, params()], [PROMPTS[1], PROMPTS[0], PROMPTS[2]])[1]
    same(alone, together)
    for completion in alone.outputs:
        assert len(exit_depths(completion)) == len(completion.token_ids) == 12
    with pytest.raises(ValueError, match="3 completions"):
        exit_depths(alone)


def test_logprobs(llm: Any, reference: Any) -> None:
    """Of sampled tokens, at the exit depth of each."""
    outputs = run(llm, [params(logprobs=5) for _ in PROMPTS])
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = list(prompt)
        depths = exit_depths(output)
        for index, token in enumerate(output.outputs[0].token_ids):
            result = reference(torch.tensor([tokens]), logits_to_keep=1)
            assert result.exit_depths.tolist() == [depths[index]]
            expected = result.logits[0, -1].log_softmax(-1)
            for candidate, value in output.outputs[0].logprobs[index].items():
                assert value.logprob == pytest.approx(expected[candidate].item(), abs=1e-3)
            tokens.append(token)


def test_prompt_logprobs(llm: Any, reference: Any) -> None:
    assert_prompt_logprobs(llm, reference)


def assert_prompt_logprobs(llm: Any, reference: Any) -> None:
    """All positions at the depth of the last one, as the original scores text."""
    long = max(PROMPTS, key=len)
    prompts = [long, PROMPTS[0], long, PROMPTS[1]]
    sampling = [params(prompt_logprobs=3), params(), params(prompt_logprobs=0), params()]
    for _ in range(2):  # again with the prompt in the prefix cache
        outputs = run(llm, sampling, prompts)
        for index in (0, 2):
            result = reference(torch.tensor([long]))
            expected = result.logits[0].log_softmax(-1)
            assert exit_depths(outputs[index])[0] == result.exit_depths.item()
            scores = outputs[index].prompt_logprobs
            assert scores[0] is None and len(scores) == len(long)
            for position, candidates in enumerate(scores[1:]):
                assert long[position + 1] in candidates
                for token, value in candidates.items():
                    right = expected[position, token].item()
                    assert value.logprob == pytest.approx(right, abs=1e-3)
        same(outputs[1], run(llm, [params()], [PROMPTS[0]])[0])


def test_replayed_depths(llm: Any) -> None:
    """A run's own depths give the run; others are followed to the letter."""
    (first,) = run(llm, [params()], PROMPTS[:1])
    depths = exit_depths(first)
    (again,) = run(
        llm, [params(extra_args={"exit_depths": depths, "exit_threshold": 0.0})], PROMPTS[:1]
    )
    same(first, again)
    other = [1, 8, 3, 3, 2, 7, 8, 1, 5, 4, 6, 2]
    (forced,) = run(llm, [params(extra_args={"exit_depths": other})], PROMPTS[:1])
    assert exit_depths(forced) == other


def test_forced_depths_equal_the_reference(llm: Any, reference: Any) -> None:
    depths = [3, 1, 8, 2, 5, 5, 1, 7]
    (output,) = run(
        llm, [params(max_tokens=8, extra_args={"exit_depths": depths})], [max(PROMPTS, key=len)]
    )
    tokens = list(max(PROMPTS, key=len))
    threshold, budget = reference.config.exit_threshold, reference.config.max_loops
    try:
        reference.config.exit_threshold = 2.0
        for depth, token in zip(depths, output.outputs[0].token_ids, strict=True):
            reference.config.max_loops = depth
            logits = reference(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1]
            assert logits.argmax().item() == token
            tokens.append(token)
    finally:
        reference.config.exit_threshold, reference.config.max_loops = threshold, budget


def test_streamed_deltas_carry_their_depths(llm: Any) -> None:
    from vllm.sampling_params import RequestOutputKind

    (whole,) = run(llm, [params()], PROMPTS[:1])
    engine = llm.llm_engine
    streamed = params(output_kind=RequestOutputKind.DELTA)
    engine.add_request("streamed", {"prompt_token_ids": PROMPTS[0]}, streamed)
    engine.add_request("other", {"prompt_token_ids": PROMPTS[1]}, params())
    tokens: list[int] = []
    depths: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id == "streamed":
                tokens += output.outputs[0].token_ids
                depths += exit_depths(output)
    assert tokens == list(whole.outputs[0].token_ids)
    assert depths == exit_depths(whole)


def test_nothing_else_sees_the_depths(llm: Any) -> None:
    (output,) = run(llm, [params()], PROMPTS[:1])
    assert output.outputs[0].routed_experts is None


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_loops": 0}, r"max_loops=0 must be a whole number from 1 to the served max_loops=8"),
        ({"max_loops": 9}, r"max_loops=9 "),
        ({"max_loops": True}, r"max_loops=True "),
        ({"max_loops": 2.0}, r"max_loops=2.0 "),
        ({"max_loops": 3, "min_loops": 4}, r"min_loops=4 must be .* 1 to max_loops=3"),
        ({"min_loops": -1}, r"min_loops=-1 "),
        ({"exit_threshold": float("nan")}, r"exit_threshold=nan must be a finite number"),
        ({"exit_threshold": "high"}, r"exit_threshold='high' "),
        ({"exit_threshold": -0.1}, r"exit_threshold=-0.1 "),
        ({"exit_depths": 3}, r"exit_depths=3 must be a list"),
        ({"exit_depths": [1, 0]}, r"exit_depths\[1\]=0 must be from 1 to max_loops=8"),
        ({"exit_depths": [5], "max_loops": 4}, r"exit_depths\[0\]=5 must be from 1 to max_loops=4"),
    ],
    ids=str,
)
def test_bad_knobs_are_refused_at_admission(llm: Any, knobs: Any, message: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message) as caught:
        run(llm, [params(extra_args=knobs)])
    assert caught.value.parameter == message.partition("=")[0].partition("\\")[0]
    assert not llm.llm_engine.has_unfinished_requests()


def test_misspelt_knobs_are_refused_at_admission(llm: Any) -> None:
    with pytest.raises(ValueError, match=r"'max_loop' is not a knob .* did you mean max_loops\?"):
        run(llm, [params(extra_args={"max_loop": 2})])
    with pytest.raises(ValueError, match=r"exit_depths has 13 entries.*max_tokens is 12"):
        run(llm, [params(extra_args={"exit_depths": [1] * 13})])


# From here on tests start engines of their own, which ends the shared one.


def test_prompt_logprobs_in_chunks(make_llm: Any, reference: Any) -> None:
    llm = make_llm(
        GOLDEN / "qwen3",
        skip_tokenizer_init=True,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        hf_overrides={"exit_threshold": KNOBS["exit_threshold"]},
    )
    scores = runner_of(llm).prompt_scores
    original, parts = scores.score, []

    def score(request_id: str, start: int, hidden: torch.Tensor) -> None:
        assert len(hidden) <= 16
        assert not any(part() is not None for part in parts), "states of an earlier part are kept"
        original(request_id, start, hidden)
        parts.append(weakref.ref(hidden))

    scores.score = score
    assert_prompt_logprobs(llm, reference)
    assert len(parts) > 4, "prompts were scored in parts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_policy": "fast"}, r"kv_policy='fast' is unknown; choose one of exact, last_exited"),
        ({"prefill_depth": 2}, r"prefill_depth=2 is unknown; choose one of lazy, full"),
        ({"exit_quorum": 0}, r"exit_quorum=0 must be a number above 0"),
        ({"exit_quorum": 1.5}, r"exit_quorum=1.5 "),
        ({"exit_quorum": True}, r"exit_quorum=True "),
        ({"quorum": 0.5}, r"has no option 'quorum'; there are kv_policy, prefill_depth,"),
        ("exact", r"\['loopus'\]='exact' must be a mapping"),
    ],
    ids=str,
)
def test_bad_engine_options(make_llm: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(GOLDEN / "qwen3", skip_tokenizer_init=True, additional_config={"loopus": options})


def test_engine_options_outside_their_section() -> None:
    with pytest.raises(ValueError, match=r"\['kv_policy'\]='last_exited' has no effect there"):
        EngineOptions.of({"kv_policy": "last_exited"})
    assert EngineOptions.of({"of_others": 1}) == EngineOptions()


def test_structured_output(make_llm: Any) -> None:
    """loopus-tiny has a tokenizer: answers follow a pattern whatever the neighbours do."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = make_llm(
        "loopus-tiny", max_model_len=64, additional_config={"loopus": {"exit_quorum": 0.05}}
    )
    patterns = [r"[0-9]{4}x", r"(ab|cd){3}", None, r"[a-c]{2}[0-9]{3}"]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=8,
            structured_outputs=StructuredOutputsParams(regex=pattern) if pattern else None,
            extra_args={"exit_depths": [1, 2, 1, 1, 2, 1, 2, 2]} if index % 2 else None,
        )
        for index, pattern in enumerate(patterns)
    ]
    prompts = ["(3+4)=", "(2*2)=", "(1+1)=", "(5+5)="]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    for pattern, output, prompt, one in zip(patterns, outputs, prompts, sampling, strict=True):
        (alone,) = llm.generate([prompt], [one], use_tqdm=False)
        assert alone.outputs[0].text == output.outputs[0].text
        if pattern:
            assert re.fullmatch(pattern, output.outputs[0].text)


def test_stop_strings(make_llm: Any) -> None:
    from vllm import SamplingParams

    llm = make_llm("loopus-tiny", max_model_len=64)
    free = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    (whole,) = llm.generate(["(3+4)="], free, use_tqdm=False)
    text = whole.outputs[0].text
    stop = text[3]
    stopping = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=[stop])
    (output, *_) = llm.generate(["(3+4)=", "(1+1)="], [stopping, free], use_tqdm=False)
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].finish_reason == "stop"
    assert len(exit_depths(output)) == len(output.outputs[0].token_ids)
