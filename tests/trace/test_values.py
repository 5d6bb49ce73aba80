"""A trace's values against the reference model's own states, prefix by prefix, in float32."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.conftest import BACKBONES, GOLDEN, golden_cases
from tests.trace.conftest import set_case, settings, trace_case, varied
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace import reference
from vllm_loopus.trace.tokens import Vocabulary

pytestmark = pytest.mark.slow

CLOSE = {"atol": 1e-3, "rtol": 0}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_exits_are_the_golden_ones(
    golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary, backbone: str
) -> None:
    """All strategies; and after the golden tokens each exit depth says the next golden token."""
    model = golden_models[backbone]
    for cases in settings(backbone):
        for case in cases:
            traced = trace_case(model, vocabulary, case)
            assert traced.trace.exit_depths == case["depths"]
            assert traced.reference_answer == (case["tokens"], None)
            for token in traced.trace.tokens:
                left = token.depths[token.exit_depth - 1]
                assert left.top[0].token_id == token.token_id
                assert left.probability == pytest.approx(left.top[0].probability, abs=1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("strategy", ["threshold", "cdf", "convergence"])
def test_states_of_every_prefix(
    golden_models: dict[str, LoopUSForCausalLM],
    vocabulary: Vocabulary,
    backbone: str,
    strategy: str,
) -> None:
    model, case = golden_models[backbone], varied(backbone, strategy)[0]
    values = trace_case(model, vocabulary, case).values
    for index in range(len(case["tokens"])):
        prefix = torch.tensor([case["prompt"] + case["tokens"][:index]])
        with torch.no_grad():
            output = model(prefix, logits_to_keep=1, output_states=True)
        depth = int(output.exit_depths[0])
        states = torch.stack([state[0, -1] for state in output.states])
        found = values.states[: depth + 1, index]
        torch.testing.assert_close(found, states, **CLOSE)
        confidences = torch.cat(output.confidences)
        torch.testing.assert_close(
            values.by_name["confidence"][:depth, index], confidences, **CLOSE
        )
        lengths = (states[1:] - states[:-1]).norm(dim=-1)
        torch.testing.assert_close(values.by_name["step_length"][:depth, index], lengths, **CLOSE)
        probabilities = output.logits[0, -1].softmax(-1)
        best = probabilities.topk(5)
        assert values.top_ids[depth - 1, index].tolist() == best.indices.tolist()
        torch.testing.assert_close(values.top_probabilities[depth - 1, index], best.values, **CLOSE)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_depth_of_one_position(
    golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary, backbone: str
) -> None:
    """Each depth against a model that has no deeper one."""
    model, case = golden_models[backbone], varied(backbone, "threshold")[0]
    traced = trace_case(model, vocabulary, case)
    values, place = traced.values, 7
    prefix = torch.tensor([case["prompt"] + case["tokens"][:place]])
    distributions = []
    for depth in range(1, 9):
        model.config.update({"max_loops": depth, "exit_threshold": 2.0})
        with torch.no_grad():
            output = model(prefix, logits_to_keep=1, output_states=True)
            state, before = output.states[-1], output.states[-2]
            update, after = model.refine(before, model.positions(before))
            coefficient = model.reasoning.gate.coefficient(update, before)[0, -1]
        torch.testing.assert_close(after, state)
        torch.testing.assert_close(values.states[depth, place], state[0, -1], **CLOSE)
        torch.testing.assert_close(
            values.by_name["gate_mean"][depth - 1, place], coefficient.mean(), **CLOSE
        )
        distributions.append(output.logits[0, -1].log_softmax(-1))
        best = distributions[-1].exp().topk(5)
        assert values.top_ids[depth - 1, place].tolist() == best.indices.tolist()
        torch.testing.assert_close(values.top_probabilities[depth - 1, place], best.values, **CLOSE)
        came = distributions[-1][case["tokens"][place]].exp()
        torch.testing.assert_close(values.probability[depth - 1, place], came, **CLOSE)
        gap = output.logits[0, -1].topk(2).values
        torch.testing.assert_close(values.logit_gap[depth - 1, place], gap[0] - gap[1], **CLOSE)
    last = distributions[-1]
    for row, log_p in enumerate(distributions):
        kl = F.kl_div(log_p, last, log_target=True, reduction="sum").clamp(min=0)
        torch.testing.assert_close(values.kl_to_last[row, place], kl, **CLOSE)
        rest = (values.states[row + 1, place] - values.states[-1, place]).norm()
        torch.testing.assert_close(values.distance_to_last[row, place], rest, **CLOSE)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_original_implementation(
    golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary, backbone: str
) -> None:
    prompt = json.loads((GOLDEN / backbone / "expected.json").read_text())["trace_prompt"]
    golden = load_file(GOLDEN / backbone / "trace.safetensors")
    model = golden_models[backbone]
    model.config.update({"max_loops": 8})
    values = reference.depth_values(model, prompt, [0])
    torch.testing.assert_close(values.states[:, 0], golden["states"], **CLOSE)
    torch.testing.assert_close(values.by_name["confidence"][:, 0], golden["q"], **CLOSE)


def test_a_head_that_reads_the_update(
    golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary
) -> None:
    model, case = golden_models["llama"], varied("llama", "threshold")[0]
    try:
        values = trace_case(model, vocabulary, case, confidence_input="update").values
        with torch.no_grad():
            output = model(torch.tensor([case["prompt"]]), output_states=True)
    finally:
        model.config.confidence_input = "state"
    found = torch.cat(output.confidences)
    torch.testing.assert_close(values.by_name["confidence"][: len(found), 0], found, **CLOSE)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_generated_tokens_are_the_golden_ones(
    golden_models: dict[str, LoopUSForCausalLM], backbone: str
) -> None:
    case = varied(backbone, "threshold")[0]
    set_case(golden_models[backbone], case)
    tokens = reference.generate(golden_models[backbone], case["prompt"], 20, [])
    assert tokens == case["tokens"]
    stop = case["tokens"][4]
    ended = reference.generate(golden_models[backbone], case["prompt"], 20, [stop])
    assert ended == case["tokens"][: case["tokens"].index(stop) + 1]


def test_logits_in_pieces(
    golden_models: dict[str, LoopUSForCausalLM],
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = golden_cases("qwen3")[0]
    whole = trace_case(golden_models["qwen3"], vocabulary, case)
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", 3 * 8 * 512)
    pieces = trace_case(golden_models["qwen3"], vocabulary, case)
    for name in ("top_ids", "top_probabilities", "kl_to_last", "probability", "logit_gap"):
        torch.testing.assert_close(getattr(pieces.values, name), getattr(whole.values, name))
