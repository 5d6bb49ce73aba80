"""Ouro on the engine: its own code's answers, whatever runs beside and however it is scheduled."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import counter, runner_of, spy_on_steps
from tests.serving.looped_answers import (
    OURO,
    OURO_LOOPS,
    assert_first_logits,
    assert_right,
    assert_right_preempted,
    copy_of,
    generate,
    ouro_cases,
    scarce,
)
from vllm_loopus import exit_depths

CASES = ouro_cases()
LOOPS = max(case["knobs"]["max_loops"] for case in CASES)
GUESSING = {"speculate": {"draft_depth": 1, "lookahead": 3}}


def test_alone_in_one_batch_and_from_the_prefix_cache(make_llm: Any) -> None:
    """The decoder has no K/V and no rows to catch up: one row for each token."""
    llm = make_llm(OURO, disable_log_stats=False, **OURO_LOOPS)
    assert_first_logits(CASES[40], generate(llm, CASES[40:41], logprobs=5)[0])
    for case in CASES[::9]:
        assert_right(llm, [case])
    steps = spy_on_steps(llm)
    assert_right(llm, CASES)
    assert sum(step.decoder_rows for step in steps) == sum(len(case["tokens"]) for case in CASES)
    assert_right(llm, CASES)
    assert counter(llm, "vllm:prefix_cache_hits") > 0


def test_scored_prompts(make_llm: Any) -> None:
    """All rows of such a prompt go through the LM head, at the depth that its last one exits at."""
    llm = make_llm(OURO, max_num_batched_tokens=16, max_num_seqs=4, **OURO_LOOPS)
    case = next(case for case in CASES if len(case["prompt"]) > 16 and case["depths"][0] < 4)
    plain, scored = generate(llm, [case]), generate(llm, [case], prompt_logprobs=1)
    assert plain[0].token_ids == scored[0].token_ids
    assert exit_depths(scored[0]) == case["depths"]


def test_chunks_and_guesses(make_llm: Any) -> None:
    llm = make_llm(
        OURO,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        additional_config={"loopus": {**GUESSING, "exit_quorum": "auto"}},
        **OURO_LOOPS,
    )
    steps = spy_on_steps(llm)
    assert_right(llm, CASES)
    assert max(rows for step in steps for rows in step.passes) == 16
    assert sum(step.guess_rows for step in steps) > 0


def test_preemption(make_llm: Any) -> None:
    short = [case for case in CASES if len(case["prompt"]) <= 40]
    assert_right_preempted(make_llm(OURO, **scarce(LOOPS), **OURO_LOOPS), short)


@pytest.mark.long
@pytest.mark.parametrize("draft_depth", [1, 2, 3])
@pytest.mark.parametrize("lookahead", [1, 7])
def test_guesses(make_llm: Any, draft_depth: int, lookahead: int) -> None:
    options = {"speculate": {"draft_depth": draft_depth, "lookahead": lookahead}}
    llm = make_llm(OURO, additional_config={"loopus": options}, **OURO_LOOPS)
    for _ in range(2):
        assert_right(llm, CASES)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"exit_quorum": 0.5},
        {"prefill_depth": "full"},
        {"overlap": "on"},
        {"overlap": "on", "late_verdicts": "on"},
        {"overlap": "on", "speculate": "auto"},
    ],
)
def test_options(make_llm: Any, options: dict[str, Any]) -> None:
    llm = make_llm(OURO, max_num_seqs=24, additional_config={"loopus": options}, **OURO_LOOPS)
    assert_right(llm, CASES)


@pytest.mark.long
def test_padded_as_for_graphs(make_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loopus.serving.worker import regions

    monkeypatch.setenv(regions.PADDED_ROWS, "1,2,4,8,16,24")
    llm = make_llm(OURO, max_num_batched_tokens=40, max_num_seqs=12, **OURO_LOOPS)
    assert_right(llm, CASES)


@pytest.mark.long
def test_last_exited_where_it_changes_nothing(make_llm: Any) -> None:
    same = [case for case in CASES if len(set(case["depths"])) == 1]
    options = {"additional_config": {"loopus": {"kv_policy": "last_exited"}}}
    assert_right(make_llm(OURO, **options, **OURO_LOOPS), same)


@pytest.mark.parametrize(
    ("fields", "knobs"),
    [
        ({"early_exit_step": 1}, {"max_loops": 2, "exit_threshold": 2.0}),
        ({"max_loops": 6, "exit_threshold": 0.5}, {"max_loops": 6, "exit_threshold": 0.5}),
    ],
)
@pytest.mark.long
def test_fields_of_the_checkpoint(
    make_llm: Any, fields: dict[str, Any], knobs: dict[str, Any], tmp_path: Path
) -> None:
    """By their own names and by ours, from config.json and from `hf_overrides`."""
    cases = [{**case, "knobs": None} for case in CASES if case["knobs"] == knobs]
    assert cases
    assert_right(make_llm(OURO, skip_tokenizer_init=True, hf_overrides=fields), cases)
    if "early_exit_step" in fields:
        folder = copy_of(OURO, tmp_path / "copy", **fields)
        assert_right(make_llm(folder, skip_tokenizer_init=True), cases)


def test_a_half_filled_head_and_the_layout(make_llm: Any) -> None:
    """Heads of 16 numbers are stored as the kernels have them, and that is what is told."""
    from vllm_loopus.serving.model.facts import layout_of_engine

    llm = make_llm(OURO, skip_tokenizer_init=True)
    planes = runner_of(llm).get_model().planes
    assert layout_of_engine(llm.llm_engine.vllm_config) == planes.layout
    assert planes.layout.kv_bytes == 2 * 4 * 32 * 4
    assert planes.layout.decoder == planes.layout.encoder == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_weighted_exit": True}, "use_weighted_exit=True is only done by the reference"),
        ({"total_ut_steps": 0}, r"max_loops=0 \(total_ut_steps\) must be from 1"),
        ({"early_exit_step": 4}, "early_exit_step=4 must be from 0 to 3"),
        ({"halting_strategy": "threshold"}, "halting_strategy='threshold' is unknown"),
    ],
)
def test_refused(make_llm: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(OURO, skip_tokenizer_init=True, hf_overrides=fields)


def test_tensors_that_do_not_fit(make_llm: Any, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text((OURO / "config.json").read_text())
    tensors = load_file(OURO / "model.safetensors")
    tensors["model.early_exit_gate.weight"] = torch.ones(1, 32)
    del tensors["model.layers.1.input_layernorm_2.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = r"missing: .*layers\.1\.input_layernorm_2.*misshapen: .*early_exit_gate"
    with pytest.raises(ValueError, match=message):
        make_llm(folder, skip_tokenizer_init=True)


def test_a_config_without_loops_of_its_own(tmp_path: Path) -> None:
    """The first published config had fewer fields: defaults are those of the model."""
    from transformers import AutoConfig

    written = json.loads((OURO / "config.json").read_text())
    for name in ("total_ut_steps", "early_exit_threshold", "head_dim", "num_key_value_heads"):
        del written[name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.max_loops, config.exit_threshold, config.head_dim) == (4, 1.0, 16)
