"""Guessed positions: the answers are the golden ones, whatever was guessed.

In each run some guesses were right and some wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import admit_too_many, counter, runner_of
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
from vllm_loopus.serving.step.wave_plan import AutoPlan, WavePlan

# Draft depth and lookahead.
waves = pytest.mark.parametrize("wave", [(1, 7), (2, 3)], ids=lambda wave: "{}-{}".format(*wave))
WAVE_OF = {
    ("threshold", 1): (1, 1),
    ("threshold", 2): (1, 7),
    ("cdf", 1): (2, 1),
    ("convergence", 1): (3, 8),
}


def speculating(make_llm: Any, setting: Any, wave: tuple[int, int], **args: Any) -> Any:
    draft_depth, lookahead = wave
    speculate = {"draft_depth": draft_depth, "lookahead": lookahead}
    return start(make_llm, setting, {"speculate": speculate, **args.pop("loopus", {})}, **args)


def outcomes(llm: Any) -> tuple[int, int]:
    """Guesses so far that were right, and wrong."""
    names = "confirmed_guesses", "rejected_guesses"
    right, wrong = (
        sum(m.value for m in llm.get_metrics() if m.name == f"vllm:loopus_{name}") for name in names
    )
    return int(right), int(wrong)


@contextmanager
def both_outcomes(llm: Any) -> Iterator[None]:
    """Inside, guesses turn out right, and others wrong."""
    before = outcomes(llm)
    yield
    right, wrong = (now - then for now, then in zip(outcomes(llm), before, strict=True))
    assert right > 0 and wrong > 0, (right, wrong)


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_alone_and_in_one_batch(make_llm: Any, setting: Any) -> None:
    wave = WAVE_OF[setting[1][:2]]
    llm = speculating(make_llm, setting, wave, enable_prefix_caching=False)
    cases = by_rule(setting[0])[setting[1]]
    for case in cases[:3]:
        assert_golden([case], generate(llm, [case]))
    before = outcomes(llm)
    assert_golden(cases, generate(llm, cases))
    right, wrong = (now - then for now, then in zip(outcomes(llm), before, strict=True))
    assert wrong > 0
    # This one has no case whose next token is known at a shallow depth.
    assert right > 0 or name_of(setting) == "llama-convergence-1"
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@pytest.mark.parametrize("quorum", [0.05, "auto"])
def test_random_order_arrival_and_aborts(make_llm: Any, quorum: float | str) -> None:
    llm = speculating(make_llm, MIXED[0], (1, 3), loopus={"exit_quorum": quorum}, max_num_seqs=12)
    with both_outcomes(llm):
        assert_golden_in_any_order(llm, by_rule(MIXED[0][0])[MIXED[0][1]])


@waves
def test_chunks_and_prefix_hits(make_llm: Any, wave: tuple[int, int]) -> None:
    llm = speculating(make_llm, MIXED[0], wave, max_num_batched_tokens=16, max_num_seqs=3)
    with both_outcomes(llm):
        assert_chunks_and_hits(llm, 16)


@waves
def test_preemption(make_llm: Any, long_answers: Any, wave: tuple[int, int]) -> None:
    """For lack of blocks. Guesses take none then."""
    cases, reference = by_rule(MIXED[0][0])[MIXED[0][1]][-12:], long_answers(MIXED[0])
    llm = speculating(make_llm, MIXED[0], wave, **SCARCE)
    admit_too_many(llm)
    for _ in range(2):
        with both_outcomes(llm):
            outputs = generate(llm, cases, max_tokens=LONG)
        assert_same(outputs, reference)
    assert counter(llm, "vllm:num_preemptions") > 0
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@waves
def test_preemption_in_a_wave(make_llm: Any, long_answers: Any, wave: tuple[int, int]) -> None:
    """Everything that runs is preempted now and then, guesses or not."""
    cases, reference = by_rule(MIXED[0][0])[MIXED[0][1]][-12:], long_answers(MIXED[0])
    llm = speculating(make_llm, MIXED[0], wave, max_num_seqs=8)
    engine, stairs, cut = llm.llm_engine, runner_of(llm)._sequences.stairs, 0
    answers: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    at_once = set()
    with both_outcomes(llm):
        for number, case in enumerate(cases):
            params = params_of(case, max_tokens=LONG)
            engine.add_request(str(number), {"prompt_token_ids": case["prompt"]}, params)
        for step in range(1, 1000):
            for output in engine.step():
                length = len(output.outputs[0].token_ids)
                at_once.add(length - lengths.get(output.request_id, 0))
                lengths[output.request_id] = length
                if output.finished:
                    answers[output.request_id] = output.outputs[0]
            if step % 9 == 0 and step < 60:
                cut += int((stairs.ahead * stairs.present).sum())
                assert engine.reset_prefix_cache(reset_running_requests=True)
            if not engine.has_unfinished_requests():
                break
    assert cut > 0
    assert max(at_once) > 1 or wave == (2, 3), "several tokens in one step"
    found = [answers[str(number)] for number in range(len(cases))]
    assert_same(found, reference)
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3, "logprobs": 2},
    {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"min_tokens": 5, "stop_token_ids": list(range(0, 512, 2))},
    {"logprobs": 3, "prompt_logprobs": 2},
    {"n": 3, "temperature": 0.3, "seed": 5},
    {"logit_bias": {5: 3.0, 77: 4.0, 300: -10.0}},
    {"allowed_token_ids": list(range(100, 200))},
    {"max_tokens": 1},
    {"max_tokens": 3},
    {"stop_token_ids": list(range(0, 512, 3))},
]


@pytest.mark.parametrize("wave", [(2, 5)])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_seeds_penalties_scores_and_stops(
    make_llm: Any, wave: tuple[int, int], overlap: str
) -> None:
    """As without guesses, each alone: the sampler never sees a guess."""
    cases = by_rule(MIXED[0][0])[MIXED[0][1]][-len(OPTIONS) :]

    def answers(llm: Any, which: list[int]) -> list[Any]:
        return llm.generate(
            [{"prompt_token_ids": cases[i]["prompt"]} for i in which],
            [params_of(cases[i], **{"max_tokens": LONG, **OPTIONS[i]}) for i in which],
            use_tqdm=False,
        )

    plain = start(make_llm, MIXED[0], enable_prefix_caching=False)
    alone = [answers(plain, [index])[0] for index in range(len(cases))]
    options = {"loopus": {"overlap": overlap}, "enable_prefix_caching": False}
    llm = speculating(make_llm, MIXED[0], wave, **options)
    every = [*range(len(cases))]
    orders = [every, every[::-1]]
    if overlap == "on":  # seeds keep the decoder from being launched before exits are read
        orders += [[i for i in every if "seed" not in OPTIONS[i]]]
    with both_outcomes(llm), decoded_ahead(llm, overlap == "on"):
        found = [(order, answers(llm, order)) for order in orders]
    for order, outputs in found:
        for index, output in zip(order, outputs, strict=True):
            assert_same_scores(output.outputs, alone[index].outputs)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_auto_and_overlap(make_llm: Any, overlap: str) -> None:
    """Guesses that run ahead of the host, and a plan that changes while sequences run."""
    cases = by_rule(MIXED[0][0])[MIXED[0][1]]
    options = {"overlap": overlap, "speculate": "auto"}
    llm = start(make_llm, MIXED[0], options, enable_prefix_caching=False, max_num_seqs=6)
    waves = runner_of(llm)._sequences.runner.guesses.waves
    assert isinstance(waves.plan, AutoPlan)
    assert_golden(cases, generate(llm, cases))
    waves.plan = Restless()
    with both_outcomes(llm):
        assert_golden(cases, generate(llm, cases))
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


class Restless(WavePlan):
    """Another plan in each step, none at all in some."""

    def __init__(self) -> None:
        super().__init__(1, 0)

    def begin_step(self, *args: Any) -> None:
        self.lookahead = (self.lookahead + 1) % 8
        self.draft_depth = 1 + self.lookahead % 3


@contextmanager
def decoded_ahead(llm: Any, ahead: bool = True) -> Iterator[None]:
    """Inside, if `ahead`, the decoder is launched before exits are read, whatever that costs."""
    runner = runner_of(llm)._sequences.runner
    rule, launch = runner.quorum, runner._decode_ahead
    done = []
    if ahead:
        runner.quorum = EagerQuorum(rule, 1)
        runner._decode_ahead = lambda active: done.append(launch(active)) or done[-1]
    yield
    runner.quorum, runner._decode_ahead = rule, launch
    assert any(done) == ahead


@pytest.mark.parametrize("wave", [(1, 6)])
def test_overlap(make_llm: Any, wave: tuple[int, int]) -> None:
    cases = by_rule(MIXED[0][0])[MIXED[0][1]]
    options = {"loopus": {"overlap": "on"}, "max_num_batched_tokens": 20, "max_num_seqs": 4}
    llm = speculating(make_llm, MIXED[0], wave, **options)
    for case in cases[:3]:
        assert_golden([case], generate(llm, [case]))
    with both_outcomes(llm), decoded_ahead(llm):
        assert_golden_in_any_order(llm, cases)


def test_a_request_without_guesses(make_llm: Any) -> None:
    llm = speculating(make_llm, MIXED[0], (1, 7))
    cases = by_rule(MIXED[0][0])[MIXED[0][1]][:4]
    before = outcomes(llm)
    outputs = llm.generate(
        [{"prompt_token_ids": case["prompt"]} for case in cases],
        [quiet(case) for case in cases],
        use_tqdm=False,
    )
    assert_golden(cases, [output.outputs[0] for output in outputs])
    assert outcomes(llm) == before and counter(llm, "vllm:loopus_guesses") == 0


def quiet(case: dict[str, Any]) -> Any:
    params = params_of(case)
    params.extra_args["speculate"] = 0
    return params


def test_text_grammars_and_stop_strings(make_llm: Any) -> None:
    """On a model that writes: a grammar in a wave, a stop string inside one."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    deep = {"exit_threshold": 1.0}
    sampling = [
        SamplingParams(temperature=0, max_tokens=12, extra_args=deep),
        SamplingParams(temperature=0, max_tokens=12, extra_args=deep, ignore_eos=True, stop=["1"]),
        SamplingParams(
            temperature=0,
            max_tokens=6,
            structured_outputs=StructuredOutputsParams(regex="[0-4]{3}"),
        ),
        SamplingParams(
            temperature=0, max_tokens=10, structured_outputs=StructuredOutputsParams(json=schema)
        ),
        SamplingParams(temperature=1.0, seed=11, n=3, max_tokens=12, extra_args=deep),
    ]
    prompts = ["3+2*3=", "1+1=", "2*2=", "7-3=", "12+9="]

    def answers(speculate: Any) -> Any:
        llm = make_llm(
            "loopus-tiny",
            additional_config={"loopus": {"speculate": speculate}},
            disable_log_stats=False,
        )
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return llm, [
            (one.text, one.token_ids, exit_depths(one), one.finish_reason, one.stop_reason)
            for output in outputs
            for one in output.outputs
        ]

    _, expected = answers("off")
    for draft_depth in (1, 2):
        llm, found = answers({"draft_depth": draft_depth, "lookahead": 4})
        assert found == expected
        assert outcomes(llm)[0] > 0


@pytest.mark.parametrize(
    ("speculate", "message"),
    [
        ("on", "speculate='on' must be 'off', 'auto' or a mapping"),
        ({"draft_depth": 0}, "draft_depth'\\]=0 must be a whole number, 1 or more"),
        ({"lookahead": 0}, "lookahead'\\]=0 must be a whole number, from 1 to"),
        ({"depth": 1}, "speculate has no option 'depth'"),
        ({"draft_depth": 99}, "draft_depth'\\]=99 must be below the served max_loops"),
    ],
)
def test_refused(make_llm: Any, speculate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(make_llm, MIXED[0], {"speculate": speculate})


def test_refused_with_last_exited(make_llm: Any) -> None:
    loopus = {"speculate": "auto", "kv_policy": "last_exited"}
    with pytest.raises(ValueError, match="not possible with kv_policy='last_exited'"):
        start(make_llm, MIXED[0], loopus)
