"""The transformers side against the original implementation: every golden case."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import BACKBONES, GOLDEN, golden_cases
from vllm_loopus.modeling.model import LoopUSForCausalLM

pytestmark = pytest.mark.slow

KNOBS = ("N", "halting_strategy", "q_threshold", "q_eval_interval", "convergence_epsilon")


@pytest.fixture(scope="module", params=BACKBONES)
def golden(request: pytest.FixtureRequest) -> tuple[str, LoopUSForCausalLM]:
    folder = GOLDEN / request.param
    return request.param, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def greedy(model: LoopUSForCausalLM, prompts: list[list[int]], steps: int) -> tuple[list, list]:
    """Greedy tokens and exit depths of left-padded prompts, one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    depths = []
    with torch.no_grad():
        for _ in range(steps):
            output = model(ids, attention_mask=mask, logits_to_keep=1)
            ids = torch.cat([ids, output.logits[:, -1].argmax(-1, keepdim=True)], dim=-1)
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
            depths.append(output.exit_depths)
    return ids[:, width:].tolist(), torch.stack(depths, dim=1).tolist()


def test_every_case(golden: tuple[str, LoopUSForCausalLM]) -> None:
    """Tokens and depths of all strategies; the prompts of one setting run as one padded batch."""
    backbone, model = golden
    settings: dict[str, list[dict]] = {}
    for case in golden_cases(backbone):
        settings.setdefault(json.dumps([case[k] for k in KNOBS]), []).append(case)
    assert len(settings) == 9
    for cases in settings.values():
        model.config.update({knob: cases[0][knob] for knob in KNOBS})
        tokens, depths = greedy(model, [case["prompt"] for case in cases], steps=20)
        assert tokens == [case["tokens"] for case in cases]
        assert depths == [case["depths"] for case in cases]


def test_trace(golden: tuple[str, LoopUSForCausalLM]) -> None:
    backbone, model = golden
    prompt = json.loads((GOLDEN / backbone / "expected.json").read_text())["trace_prompt"]
    trace = load_file(GOLDEN / backbone / "trace.safetensors")
    model.config.update({"N": 8, "q_threshold": 2.0, "halting_strategy": "threshold"})
    with torch.no_grad():
        output = model(torch.tensor([prompt]), output_states=True)
    states = torch.stack([state[0, -1] for state in output.states])
    torch.testing.assert_close(states, trace["states"], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(output.confidences), trace["q"], atol=1e-4, rtol=0)


def test_generate(golden: tuple[str, LoopUSForCausalLM]) -> None:
    """transformers' own `generate` gives the same tokens as the loop above."""
    backbone, model = golden
    case = golden_cases(backbone)[0]
    model.config.update({knob: case[knob] for knob in KNOBS})
    ids = model.generate(torch.tensor([case["prompt"]]), do_sample=False, max_new_tokens=20)
    assert ids[0, len(case["prompt"]) :].tolist() == case["tokens"]
