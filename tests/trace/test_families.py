"""Traces and facts of an architecture without gate, encoder and decoder: Ouro."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.conftest import GOLDEN_LOOPED
from vllm_loopus.architectures.ouro.record import OURO
from vllm_loopus.architectures.ouro.reference import OuroForCausalLM
from vllm_loopus.cli.main import app
from vllm_loopus.trace import page, pictures
from vllm_loopus.trace.convergence import convergence
from vllm_loopus.trace.exits import exits_of, rule_of
from vllm_loopus.trace.questions import Question
from vllm_loopus.trace.record import document
from vllm_loopus.trace.reference import depth_values
from vllm_loopus.trace.tokens import Vocabulary
from vllm_loopus.trace.tracing import set_knobs, traced
from vllm_loopus.trace.trajectories import trajectories

FOLDER = GOLDEN_LOOPED / "ouro"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def model() -> OuroForCausalLM:
    return OuroForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_values(model: OuroForCausalLM) -> None:
    """Those that Ouro's own code computes."""
    set_knobs(model.config, max_loops=6, exit_threshold=2.0)
    golden, prompt = load_file(FOLDER / "trace.safetensors"), EXPECTED["trace_prompt"]
    values = depth_values(model, prompt, [1], top=1)
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(values.states[:, 0], golden["states"][:, -1], **close)
    torch.testing.assert_close(values.by_name["confidence"][:, 0], golden["lambda"][:, -1], **close)
    assert values.top_ids[:, 0, 0].tolist() == golden["logits"].argmax(-1).tolist()


def test_page_and_pictures_leave_out_what_it_lacks(model: OuroForCausalLM) -> None:
    case = next(
        case
        for case in EXPECTED["cases"]
        if (case["total_ut_steps"], case["early_exit_threshold"]) == (6, 0.5)
        and len(set(case["depths"])) > 3
    )
    rule = set_knobs(model.config, max_loops=6, exit_threshold=0.5)
    question = Question(None, case["prompt"], case["tokens"])
    one = traced(model, Vocabulary(None, 320, "ouro"), question, (case["tokens"], None))
    assert one.trace.exit_depths == case["depths"] and one.reference_answer[0] == case["tokens"]
    made = document(
        "m", "transformers", "float32", OURO.name, rule, [one.trace], convergence([one.values])
    )
    read = json.loads(json.dumps(made, allow_nan=False))
    assert read["values"] == ["confidence", "step_length"]
    assert read["exits"] == {
        "limit": "exit_threshold",
        "comparison": ">=",
        "checked": [1, 2, 3, 4, 5, 6],
    }
    assert exits_of(read["traces"][0], rule_of(read)).depths == case["depths"]
    later = exits_of(read["traces"][0], rule_of(read, exit_threshold=2.0))
    assert set(later.depths) == {6}
    shown = page.render(read)
    assert 'id="step"' in shown and 'id="gate"' not in shown and "gate mean" not in shown
    with_states = {**read["traces"][0], "trajectories": trajectories(one.values)}
    assert len(pictures.draw_trajectories(with_states, "m").axes) == 3


@pytest.mark.parametrize("field", ["exit_interval", "convergence_epsilon"])
def test_fields_of_other_families(model: OuroForCausalLM, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=2 is not a field of Ouro checkpoints"):
        set_knobs(model.config, **{field: 2})


def test_info() -> None:
    result = CliRunner().invoke(app, ["info", str(FOLDER), "--json", "--dtype", "float32"])
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert (told["family"], told["encoder"], told["reasoning"]) == (
        "Ouro",
        "no layer",
        "layers 0-2 (3)",
    )
    assert "recast_from" not in told and told["max_loops"] == 4
    # Per loop: K/V of three layers with four heads of 16, stored as heads of 32, and a state.
    assert told["kv"]["bytes_a_token"]["1"] == 4 * (3 * 2 * 4 * 32 + 2 * 4 * 32)
