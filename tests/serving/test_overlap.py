"""Calls that run ahead of what the host knows: the answers are the golden ones.

Each mode forces what `auto` would do on a fast device: the next pass before the tokens are read,
verdicts one pass late, the decoder before the exits are read, passes in chains.
"""

from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import (
    admit_too_many,
    counter,
    golden_cases,
    runner_of,
)
from tests.serving.fake_executor import EagerQuorum
from tests.serving.test_early_exit import (
    LONG,
    MIXED,
    SCARCE,
    SETTINGS,
    assert_chunks_and_hits,
    assert_golden,
    assert_golden_in_any_order,
    assert_same,
    assert_same_scores,
    by_rule,
    generate,
    name_of,
    params_of,
    pool,
    start,
)
from vllm_loopus import exit_depths


class Mode(NamedTuple):
    overlap: str = "on"
    late_verdicts: str = "auto"
    passes: int = 0  # in a chain, decoded ahead


MODES = {
    "overlap": Mode(),
    "late": Mode(late_verdicts="on"),
    "late alone": Mode(overlap="off", late_verdicts="on"),
    "never late": Mode(late_verdicts="off"),
    "decoder ahead": Mode(passes=1),
    "chains": Mode(passes=3),
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def running(make_llm: Any, setting: Any, mode: Mode, **args: Any) -> Any:
    loopus = {
        "overlap": mode.overlap,
        "late_verdicts": mode.late_verdicts,
        **args.pop("loopus", {}),
    }
    llm = start(make_llm, setting, loopus, **args)
    runner = runner_of(llm)._sequences.runner
    while isinstance(runner.quorum, EagerQuorum):
        runner.quorum = runner.quorum.rule
    if mode.passes:
        runner.quorum = EagerQuorum(runner.quorum, mode.passes)
    return llm


@modes
@pytest.mark.parametrize("setting", SETTINGS[:4], ids=name_of)
def test_alone_and_in_one_batch(make_llm: Any, setting: Any, mode: Mode) -> None:
    llm = running(make_llm, setting, mode, enable_prefix_caching=False)
    cases = by_rule(setting[0])[setting[1]]
    for case in cases[:3]:
        assert_golden([case], generate(llm, [case]))
    assert_golden(cases, generate(llm, cases))
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@modes
@pytest.mark.parametrize("quorum", [0.05, "auto"])
def test_random_order_arrival_and_aborts(make_llm: Any, mode: Mode, quorum: float | str) -> None:
    llm = running(make_llm, MIXED[0], mode, loopus={"exit_quorum": quorum}, max_num_seqs=12)
    assert_golden_in_any_order(llm, by_rule(MIXED[0][0])[MIXED[0][1]])


@modes
def test_chunks_and_prefix_hits(make_llm: Any, mode: Mode) -> None:
    llm = running(make_llm, MIXED[0], mode, max_num_batched_tokens=16, max_num_seqs=16)
    assert_chunks_and_hits(llm, 16)


@modes
def test_preemption(make_llm: Any, long_answers: Any, mode: Mode) -> None:
    cases, reference = by_rule(MIXED[0][0])[MIXED[0][1]][-12:], long_answers(MIXED[0])
    llm = running(make_llm, MIXED[0], mode, **SCARCE)
    admit_too_many(llm)
    assert_same(generate(llm, cases, max_tokens=LONG), reference)
    assert counter(llm, "vllm:num_preemptions") > 0
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@modes
def test_seeds_penalties_scores_and_stops(make_llm: Any, mode: Mode) -> None:
    """As without overlap, each alone: what a sampler keeps for a request moves on with its tokens
    only."""
    cases = by_rule(MIXED[0][0])[MIXED[0][1]][-8:]
    options: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "top_p": 0.9, "seed": 3, "logprobs": 2},
        {"repetition_penalty": 1.5, "presence_penalty": 0.7},
        {"min_tokens": 5, "stop_token_ids": list(range(0, 512, 2))},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"n": 2, "temperature": 1.0, "seed": 5},
        {"max_tokens": 1},
        {"allowed_token_ids": list(range(100, 200))},
    ]

    def answers(llm: Any, which: list[int]) -> list[Any]:
        return llm.generate(
            [{"prompt_token_ids": cases[i]["prompt"]} for i in which],
            [params_of(cases[i], **options[i]) for i in which],
            use_tqdm=False,
        )

    plain = running(make_llm, MIXED[0], Mode("off", "off"), enable_prefix_caching=False)
    alone = [answers(plain, [index])[0] for index in range(len(cases))]
    llm = running(make_llm, MIXED[0], mode, enable_prefix_caching=False)
    for order in ([*range(8)], [*range(8)][::-1], [2, 3, 4, 6, 7]):  # the last without seeds
        for index, output in zip(order, answers(llm, order), strict=True):
            assert_same_scores(output.outputs, alone[index].outputs)
            scores = output.prompt_logprobs, alone[index].prompt_logprobs
            assert (scores[0] is None) == (scores[1] is None)
            for mine, theirs in zip(*((score or ())[1:] for score in scores), strict=True):
                for token in mine:
                    assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-3)


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_last_exited_where_all_tokens_leave_at_one_depth(make_llm: Any, passes: int) -> None:
    """Then nothing is taken over that would have been computed otherwise."""
    cases = [c for c in golden_cases("qwen3") if len(set(c["depths"])) == 1]
    llm = running(make_llm, MIXED[0], Mode(passes=passes), loopus={"kv_policy": "last_exited"})
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": case["prompt"]} for case in cases],
        [
            SamplingParams(
                temperature=0,
                max_tokens=20,
                ignore_eos=True,
                detokenize=False,
                extra_args={"exit_depths": case["depths"]},
            )
            for case in cases
        ],
        use_tqdm=False,
    )
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["tokens"]
        assert exit_depths(output) == case["depths"]


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_last_exited_does_not_depend_on_what_runs_ahead(make_llm: Any, passes: int) -> None:
    """Tokens of changing depths, by the head: K/V that a late pass wrote is not left there."""
    cases = [c for c in by_rule(MIXED[0][0])[MIXED[0][1]] if len(set(c["depths"])) > 2][:8]
    loopus = {"kv_policy": "last_exited"}
    plain = running(make_llm, MIXED[0], Mode("off", "off"), loopus=loopus)
    expected = generate(plain, cases, max_tokens=LONG)
    llm = running(make_llm, MIXED[0], Mode(passes=passes), loopus=loopus)
    assert_same(generate(llm, cases, max_tokens=LONG), expected)


def test_grammars(make_llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def answers(overlap: str, passes: int) -> list[str]:
        llm = make_llm("loopus-tiny", additional_config={"loopus": {"overlap": overlap}})
        runner = runner_of(llm)._sequences.runner
        if passes:
            runner.quorum = EagerQuorum(runner.quorum, passes)
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=6,
                structured_outputs=StructuredOutputsParams(regex=regex) if regex else None,
            )
            for regex in (r"[0-4]{3}", None, r"(ab|cd)+x", None)
        ]
        outputs = llm.generate(["3+2*3=", "1+1=", "2*2=", "7-3="], sampling, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    expected = answers("off", 0)
    assert answers("on", 0) == answers("on", 2) == expected


def test_what_ran_ahead_of_an_abort_is_cleansed(make_llm: Any) -> None:
    """A request whose next pass is NaN is aborted before that is read: its blocks are safe."""
    llm = running(make_llm, MIXED[0], Mode(passes=1), enable_prefix_caching=False)
    engine, model = llm.llm_engine, runner_of(llm).get_model()
    case = by_rule(MIXED[0][0])[MIXED[0][1]][0]
    engine.add_request("99", {"prompt_token_ids": case["prompt"]}, params_of(case))
    refine, calls = model.refine, 0

    def poisoned(state: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        return refine(torch.full_like(state, torch.nan), *rest)

    for _ in range(3):
        engine.step()
    model.refine = poisoned
    while not calls:  # until a pass runs ahead
        engine.step()
    del model.refine
    engine.abort_request(["99"])
    assert_golden([case], generate(llm, [case]))
    assert all(torch.isfinite(cache).all() for cache in model.planes.floats())
