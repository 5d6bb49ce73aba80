"""`kv_planes` `last:m`: passes deeper than m, and the decoder after them, see the K/V of depth m at
all positions; answers are those of a reference that does so, in whatever way they are computed."""

from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.conftest import admit_too_many, counter, kv_manager, runner_of
from tests.serving.test_early_exit import (
    GOLDEN,
    LONG,
    MIXED,
    SCARCE,
    SETTINGS,
    assert_same,
    by_rule,
    generate,
    name_of,
    params_of,
    start,
)
from vllm_loopus import exit_depths
from vllm_loopus.bench.kv_reference import KVReference, KVSetting

CERTAIN = 1e-3


def cases_of(setting: Any, count: int) -> list[dict[str, Any]]:
    every = by_rule(setting[0])[setting[1]]
    return every[:: len(every) // count][:count]


def reference_answers(setting: Any, last: int, cases: list[dict[str, Any]], tokens: int) -> Any:
    backbone, (strategy, interval, epsilon) = setting
    answers = []
    for case in cases:
        model = KVReference.of(
            GOLDEN / backbone,
            KVSetting(last=last),
            halting_strategy=strategy,
            exit_interval=interval,
            convergence_epsilon=epsilon,
            max_loops=case["N"],
            exit_threshold=case["q_threshold"],
        )
        answers.append(model.continued(case["prompt"], tokens))
    return answers


def assert_answers(outputs: list[Any], answers: list[Any]) -> None:
    for output, (tokens, depths, gaps) in zip(outputs, answers, strict=True):
        unclear = next((i for i, gap in enumerate(gaps) if gap < CERTAIN), len(tokens))
        assert list(output.token_ids)[:unclear] == tokens[:unclear]
        assert exit_depths(output)[:unclear] == depths[:unclear]


@pytest.mark.parametrize(
    ("setting", "last"),
    [
        (MIXED[0], 2),
        *(
            pytest.param(setting, last, marks=pytest.mark.long)
            for setting in SETTINGS
            for last in (1, 3, 5)
        ),
    ],
    ids=lambda value: name_of(value) if isinstance(value, tuple) else str(value),
)
def test_what_a_position_sees(make_llm: Any, setting: Any, last: int) -> None:
    """Alone, in one batch, in chunks and from prefix hits, after preemptions."""
    cases = cases_of(setting, 4)
    expected = reference_answers(setting, last, cases, LONG)
    assert max(d for _, depths, _ in expected for d in depths) == 8
    shared = {"kv_planes": f"last:{last}"}
    llm = start(make_llm, setting, shared, enable_prefix_caching=False)
    assert_answers([generate(llm, [case], max_tokens=LONG)[0] for case in cases[:2]], expected[:2])
    assert_answers(generate(llm, cases, max_tokens=LONG), expected)
    assert (
        kv_manager(llm).block_pool.get_num_free_blocks()
        == runner_of(llm).kv_cache_config.num_blocks - 1
    )

    llm = start(make_llm, setting, shared, max_num_batched_tokens=16, max_num_seqs=3)
    for _ in range(2):
        assert_answers(generate(llm, cases, max_tokens=LONG), expected)
    assert len(kv_manager(llm).blocks_by_depth()) == last

    # Room for one sequence of the greatest length at all depths, and eight that want to run.
    scarce = {**SCARCE, "num_gpu_blocks_override": 3 * last + 1, "enable_prefix_caching": False}
    llm = start(make_llm, setting, {**shared, "exit_quorum": 0.05}, **scarce)
    admit_too_many(llm)
    assert_answers(generate(llm, cases * 2, max_tokens=LONG), expected * 2)
    assert counter(llm, "vllm:num_preemptions") > 0 or kv_manager(llm).short_of_planes > 0


@pytest.mark.parametrize("prefill", ["lazy", pytest.param("full", marks=pytest.mark.long)])
def test_scores_of_prompts(make_llm: Any, prefill: str) -> None:
    """A scored prompt goes to the exit depth of its last position as a whole."""
    setting, last = MIXED[0], 2
    cases = [case for case in cases_of(setting, 12) if len(case["prompt"]) > 4]
    assert {case["N"] for case in cases} >= {8}
    loopus = {"kv_planes": f"last:{last}", "prefill_depth": prefill}
    llm = start(make_llm, setting, loopus, max_num_batched_tokens=16, max_num_seqs=4)
    outputs = llm.generate(
        [{"prompt_token_ids": case["prompt"]} for case in cases],
        [params_of(case, max_tokens=3, prompt_logprobs=0) for case in cases],
        use_tqdm=False,
    )
    deep = 0
    for case, output in zip(cases, outputs, strict=True):
        model = KVReference.of(
            GOLDEN / setting[0],
            KVSetting(last=last),
            max_loops=case["N"],
            exit_threshold=case["q_threshold"],
        )
        with torch.inference_mode():
            right = model(torch.tensor([case["prompt"]]))
        deep += int(right.exit_depths[0]) > last
        scores = right.logits[0].log_softmax(-1)
        for at, (token, found) in enumerate(
            zip(case["prompt"][1:], output.prompt_logprobs[1:], strict=True)
        ):
            assert found[token].logprob == pytest.approx(scores[at, token].item(), abs=1e-3)
        tokens, depths, gaps = model.continued(case["prompt"], 3)
        assert_answers(output.outputs, [(tokens, depths, gaps)])
    assert deep > 1


ARITHMETIC = [("bfloat16", "auto", "all"), ("bfloat16", "fp8", "all"), ("float32", "fp8", "last:4")]


@pytest.mark.parametrize(("dtype", "kv_dtype", "planes"), ARITHMETIC)
def test_blocks_and_bytes_in_use(make_llm: Any, dtype: str, kv_dtype: str, planes: str) -> None:
    """Early exit, and half of the budgets at 2: blocks by depth, and the bytes that they take."""
    block, tokens = 32, 6
    llm = make_llm(
        GOLDEN / "qwen3",
        skip_tokenizer_init=True,
        dtype=dtype,
        kv_cache_dtype=kv_dtype,
        block_size=block,
        enable_prefix_caching=False,
        additional_config={"loopus": {"kv_planes": planes, "exit_quorum": 1.0}},
    )
    config, layout = runner_of(llm).model.config, runner_of(llm).model.planes.layout
    exits = {2: [1, 2, 1, 1, 2, 1], 8: [1, 3, 2, 7, 4, 1]}  # depths of the tokens
    held = [0] * layout.planes
    for index in range(6):
        budget, prompt = (2, 8)[index % 2], 20 + 7 * index
        for depth in range(1, layout.planes + 1):
            # Positions up to that of the last token that went as deep; depth 1 has all.
            going = [at for at, exit_ in enumerate(exits[budget]) if exit_ >= depth]
            held[depth - 1] += -(-(prompt + going[-1]) // block) if going else 0
        llm.llm_engine.add_request(
            str(index),
            {"prompt_token_ids": list(range(1, prompt + 1))},
            SamplingParams(
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={"max_loops": budget, "exit_depths": exits[budget]},
            ),
        )
    manager, most = kv_manager(llm), [0] * layout.planes
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        most = [max(pair) for pair in zip(most, manager.blocks_by_depth(), strict=True)]
    assert most == held
    number = {"auto": torch.bfloat16.itemsize, "fp8": 1}[kv_dtype]
    row = 2 * config.base.num_key_value_heads * (config.hidden_size // 4) * number
    state = config.hidden_size * {"bfloat16": 2, "float32": 4}[dtype]
    parts = ("encoder", "reasoning", "decoder")
    layers = sum(len(getattr(config, f"{part}_layer_indices")) for part in parts)
    a_block = block * (layers * row + -(-state // row) * row)
    storage = runner_of(llm).model.planes.state_pages()[0].untyped_storage().nbytes()
    assert storage == a_block * manager.block_pool.num_gpu_blocks
    assert sum(held) * a_block == sum(held) * block * layout.block_bytes_per_token


@pytest.mark.long
@pytest.mark.parametrize("last", [1, 3])
def test_last_exited(make_llm: Any, last: int) -> None:
    """Alone as in one batch; where no token exits deeper than m, as with all planes."""
    cases = cases_of(MIXED[0], 8)
    loopus = {"kv_policy": "last_exited", "kv_planes": f"last:{last}"}
    llm = start(make_llm, MIXED[0], loopus, enable_prefix_caching=False)
    shallow = [{**case, "N": min(case["N"], last)} for case in cases]
    together = [generate(llm, of, max_tokens=LONG) for of in (cases, shallow)]
    assert max(d for output in together[0] for d in exit_depths(output)) == 8
    assert_same([generate(llm, [case], max_tokens=LONG)[0] for case in cases], together[0])
    llm = start(make_llm, MIXED[0], {"kv_policy": "last_exited"}, enable_prefix_caching=False)
    assert_same(generate(llm, shallow, max_tokens=LONG), together[1])
