"""Where tokens leave and why; the same from a trace's JSON."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from tests.trace.conftest import trace_case, varied
from vllm_loopus.architectures.loopus import LOOPUS
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace.convergence import convergence
from vllm_loopus.trace.exits import exits, exits_of, rule_of
from vllm_loopus.trace.record import document, number
from vllm_loopus.trace.tokens import Vocabulary
from vllm_loopus.trace.tracing import difference

RULE = HaltingRule(
    strategy="threshold",
    exit_threshold=0.5,
    exit_interval=1,
    min_loops=1,
    max_loops=4,
    convergence_epsilon=2.0,
)


def values(q: torch.Tensor, lengths: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    return {"confidence": q, "step_length": torch.ones_like(q) if lengths is None else lengths}


@pytest.mark.parametrize(
    ("changed", "q", "depth", "reason"),
    [
        ({}, [0.4, 0.6, 0.1, 0.1], 2, "threshold"),
        ({}, [0.4, 0.5, 0.1, 0.1], 4, "budget"),
        ({}, [0.4, 0.5, 0.1, 0.9], 4, "threshold"),
        ({"min_loops": 2}, [0.6, 0.1, 0.9, 0.1], 3, "threshold"),
        ({"min_loops": 2}, [0.6, 0.6, 0.9, 0.1], 2, "min_loops"),
        ({"min_loops": 2}, [0.1, 0.6, 0.9, 0.1], 2, "threshold"),
        ({"min_loops": 4}, [0.6, 0.1, 0.1, 0.1], 4, "budget"),
        ({"min_loops": 4}, [0.6, 0.1, 0.1, 0.8], 4, "min_loops"),
        ({"exit_interval": 2}, [0.9, 0.1, 0.9, 0.1], 4, "budget"),
        ({"exit_interval": 3}, [0.9, 0.9, 0.1, 0.9], 4, "threshold"),
        ({"strategy": "cdf"}, [0.4, 0.2, 0.0, 0.0], 2, "cdf"),
        ({"strategy": "cdf", "exit_interval": 2}, [0.9, 0.4, 0.9, 0.2], 4, "cdf"),
        ({"strategy": "cdf", "min_loops": 3}, [0.9, 0.1, 0.0, 0.0], 3, "min_loops"),
    ],
)
def test_by_confidence(changed: dict, q: list[float], depth: int, reason: str) -> None:
    found = exits(replace(RULE, **changed), values(torch.tensor([q]).T))
    assert (found.depths, found.reasons) == ([depth], [reason])


def test_by_step_length() -> None:
    rule = replace(RULE, strategy="convergence", exit_interval=3)
    lengths = torch.tensor([[3.0, 1.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]]).T
    found = exits(rule, values(torch.ones(4, 3), lengths))
    assert found.depths == [2, 4, 1]
    assert found.reasons == ["convergence", "budget", "convergence"]
    assert found.margins == pytest.approx([1.0, 0.0, 1.0])


def test_margins_leave_out_what_does_not_decide() -> None:
    q = torch.tensor([[0.5, 0.7, 0.9, 0.5]]).T
    margin = exits(replace(RULE, min_loops=2), values(q)).margins[0]
    assert margin == pytest.approx(0.2)  # not depth 1, too small to leave at
    never = exits(replace(RULE, exit_interval=3), values(q))
    assert never.margins[0] == pytest.approx(0.4)  # depth 3 alone
    assert exits(replace(RULE, max_loops=1), values(q[:1])).margins == [math.inf]


@pytest.mark.parametrize("strategy", ["threshold", "cdf", "convergence"])
def test_from_json(
    golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary, strategy: str
) -> None:
    """JSON keeps every bit that the rule looks at."""
    model = golden_models["phi3"]
    traced = trace_case(model, vocabulary, varied("phi3", strategy)[0])
    rule = HaltingRule.from_config(model.config)
    made = document(
        "m",
        "transformers",
        "float32",
        LOOPUS.name,
        rule,
        [traced.trace],
        convergence([traced.values]),
    )
    read = json.loads(json.dumps(made, allow_nan=False))
    again = exits_of(read["traces"][0], rule_of(read))
    assert again == traced.exits
    assert asdict(rule_of(read)) == asdict(rule)
    q = [[d["confidence"] for d in t["depths"]] for t in read["traces"][0]["tokens"]]
    assert torch.equal(torch.tensor(q).T, traced.values.by_name["confidence"])


def test_numbers() -> None:
    value = torch.tensor(0.1)
    assert number(value) == 0.1 and torch.tensor(number(value)) == value
    assert number(math.nan) is None and number(math.inf) is None


def test_differences(golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary) -> None:
    case = varied("qwen3", "threshold")[0]
    traced = trace_case(golden_models["qwen3"], vocabulary, case)
    tokens, depths = case["tokens"], case["depths"]
    assert difference(traced, (tokens, depths)) is None
    assert difference(traced, (tokens, None)) is None
    found = difference(traced, (tokens, [*depths[:3], depths[3] + 1, *depths[4:]]))
    assert found is not None and (found.token, found.certain) == (3, True)
    found = difference(traced, ([*tokens[:5], tokens[5] + 1, *tokens[6:]], depths))
    assert found is not None and (found.token, found.certain) == (5, True)
    found = difference(traced, (tokens[:7], depths[:7]))
    assert found is not None and found.token == 7
    near = replace(traced, exits=replace(traced.exits, margins=[1e-6] * 20))
    found = difference(near, (tokens, [depths[0] + 1, *depths[1:]]))
    assert found is not None and not found.certain
