"""Ouro on the transformers side, against its own code; its config and exit rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import GOLDEN_LOOPED
from vllm_loopus.architectures.ouro.config import OuroConfig
from vllm_loopus.architectures.ouro.exit_rule import CumulativeRule
from vllm_loopus.architectures.ouro.reference import OuroForCausalLM
from vllm_loopus.modeling.exit_rule import ExitTracker

OURO = GOLDEN_LOOPED / "ouro"
EXPECTED = json.loads((OURO / "expected.json").read_text())
KNOBS = ("total_ut_steps", "early_exit_threshold", "exit_at_step", "use_weighted_exit")


@pytest.fixture
def model() -> OuroForCausalLM:
    found = AutoModelForCausalLM.from_pretrained(OURO, dtype=torch.float32)
    assert isinstance(found, OuroForCausalLM)  # `auto_map` is not asked for its remote code
    return found


def settings() -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The golden cases by their knobs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in EXPECTED["cases"]:
        found.setdefault(json.dumps([case[name] for name in KNOBS]), []).append(case)
    return [({name: cases[0][name] for name in KNOBS}, cases) for cases in found.values()]


def set_knobs(config: OuroConfig, knobs: dict[str, Any]) -> None:
    renamed = {"exit_at_step": "early_exit_step"}
    config.update({renamed.get(name, name): value for name, value in knobs.items()})


@pytest.mark.slow
def test_every_case(model: OuroForCausalLM) -> None:
    """Tokens, depths and first logits; the prompts of one setting run as one padded batch."""
    assert len(settings()) == 13
    for knobs, cases in settings():
        set_knobs(model.config, knobs)
        width = max(len(case["prompt"]) for case in cases)
        ids = torch.tensor([[0] * (width - len(c["prompt"])) + c["prompt"] for c in cases])
        mask = torch.tensor(
            [[0] * (width - len(c["prompt"])) + [1] * len(c["prompt"]) for c in cases]
        )
        depths, first = [], None
        with torch.no_grad():
            for _ in range(EXPECTED["new_tokens"]):
                output = model(ids, attention_mask=mask, logits_to_keep=1)
                first = output.logits[:, -1] if first is None else first
                ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=-1)
                mask = torch.cat([mask, mask.new_ones(len(cases), 1)], dim=-1)
                depths.append(output.exit_depths)
        assert ids[:, width:].tolist() == [case["tokens"] for case in cases]
        if not knobs["use_weighted_exit"]:
            assert torch.stack(depths, dim=1).tolist() == [case["depths"] for case in cases]
        assert first is not None
        for case, logits in zip(cases, first, strict=True):
            for token, expected in case["first_logits_top5"].items():
                assert abs(float(logits[int(token)]) - expected) < 1e-3


def test_trace(model: OuroForCausalLM) -> None:
    trace = load_file(OURO / "trace.safetensors")
    set_knobs(model.config, {"total_ut_steps": 6, "early_exit_threshold": None})
    ids = torch.tensor([EXPECTED["trace_prompt"]])
    with torch.no_grad():
        output = model(ids, output_states=True)
        states = torch.stack([state[0] for state in output.states])
        hazards = model.exit_probability(states[1:])
        logits = model.head(states[1:, -1])
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(states, trace["states"], **close)
    torch.testing.assert_close(hazards, trace["lambda"], **close)
    torch.testing.assert_close(torch.cat(output.confidences), trace["lambda"][:, -1], **close)
    torch.testing.assert_close(logits, trace["logits"], **close)


def test_generate_with_weighted_exit(model: OuroForCausalLM) -> None:
    case = next(case for case in EXPECTED["cases"] if case["use_weighted_exit"])
    found = model.generate(
        torch.tensor([case["prompt"]]), use_weighted_exit=True, do_sample=False,
        max_new_tokens=len(case["tokens"]),
    )  # fmt: skip
    assert found[0, len(case["prompt"]) :].tolist() == case["tokens"]


def test_threshold_one_is_reached_where_the_gate_is_certain(model: OuroForCausalLM) -> None:
    """Never, but for a gate that says 1.0 in float32."""
    ids = torch.tensor([EXPECTED["trace_prompt"]])
    with torch.no_grad():
        assert model(ids).exit_depths.tolist() == [4]
        model.model.early_exit_gate.bias.fill_(100)
        assert model(ids).exit_depths.tolist() == [1]
        model.config.exit_threshold = 1.5
        assert model(ids).exit_depths.tolist() == [4]


@hypothesis_settings(deadline=None)
@given(
    hazards=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    threshold=st.floats(0, 1.5),
    budgets=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
)
def test_exit_rule(hazards: list[float], threshold: float, budgets: list[int]) -> None:
    """It is what the paper says, in double precision but for rounding; what is predetermined is
    what it decides."""
    rule = CumulativeRule("cdf", threshold, *budgets)
    tracker, left, reached = ExitTracker(rule, 1), 1.0, 0.0
    for depth, hazard in enumerate(hazards, start=1):
        known = rule.predetermined(
            depth, exit_threshold=threshold, min_loops=budgets[0], max_loops=budgets[1]
        )
        exits = bool(tracker.update(depth, torch.tensor([hazard])))
        assert known in (None, exits)
        reached, left = reached + left * hazard, left * (1 - hazard)
        if depth < budgets[1] and abs(reached - threshold) > 1e-6:
            assert exits == (reached >= threshold and depth >= budgets[0])
        if exits:
            return
    raise AssertionError("it did not exit")


def test_names_of_the_checkpoint_and_ours() -> None:
    config = AutoConfig.from_pretrained(OURO)
    assert isinstance(config, OuroConfig)
    assert (config.max_loops, config.exit_threshold, config.min_loops) == (4, 1.0, 1)
    config.update({"max_loops": 3, "exit_threshold": 0.5})
    assert (config.total_ut_steps, config.early_exit_threshold) == (3, 0.5)
    config.update({"total_ut_steps": 6, "early_exit_threshold": 0.7, "early_exit_step": 1})
    assert (config.max_loops, config.exit_threshold) == (2, 2.0)  # beats the threshold
    again = OuroConfig.from_dict(config.to_dict())
    assert (again.max_loops, again.early_exit_threshold, again.total_ut_steps) == (2, 0.7, 6)
    config.update({"early_exit_step": None, "early_exit_threshold": None})
    assert (config.max_loops, config.exit_threshold) == (6, 2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_ut_steps": 0}, r"max_loops=0 \(total_ut_steps\) must be from 1 to"),
        ({"max_loops": 1000}, r"max_loops=1000 \(total_ut_steps\) must be from 1 to"),
        ({"total_ut_steps": 2.5}, "total_ut_steps=2.5 must be a whole number"),
        ({"early_exit_step": 4}, "early_exit_step=4 must be from 0 to 3"),
        ({"early_exit_step": -1}, "early_exit_step=-1 must be from 0 to 3"),
        ({"early_exit_threshold": -0.1}, r"exit_threshold=-0.1 \(early_exit_threshold\)"),
        ({"early_exit_threshold": float("nan")}, "early_exit_threshold=nan must be a finite"),
        ({"halting_strategy": "kl"}, "halting_strategy='kl' is unknown; choose one of cdf"),
        ({"min_loops": 5}, "min_loops=5 must be from 1 to max_loops=4"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types has 'sliding_attention'"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OuroConfig.from_dict({**json.loads((OURO / "config.json").read_text()), **fields})


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((OURO / "config.json").read_text())
    tensors = load_file(OURO / "model.safetensors")
    del tensors["model.early_exit_gate.weight"]
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"missing: model\.early_exit_gate\.weight; misshapen: \('model\.norm\.weight'"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
