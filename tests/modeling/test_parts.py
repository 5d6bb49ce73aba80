"""Gate, confidence head and halting rule on their own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_loopus.modeling.confidence import ConfidenceHead
from vllm_loopus.modeling.exit_rule import ExitTracker, new_carry
from vllm_loopus.modeling.gate import SelectiveGate
from vllm_loopus.modeling.halting import HaltingRule


@pytest.fixture
def gate() -> SelectiveGate:
    gate = SelectiveGate(64)
    gate.reset_parameters(torch.Generator().manual_seed(3))
    return gate


def test_gate_formula(gate: SelectiveGate) -> None:
    u, h = torch.randn(5, 64), torch.randn(5, 64)
    p = {name: value.detach() for name, value in gate.named_parameters()}
    raw = (u - h) @ p["dt_input_proj.weight"].T @ p["delta_proj.weight"].T + p["delta_proj.bias"]
    delta = torch.log1p(torch.exp(raw))
    a = torch.exp(delta * -torch.exp(p["A_log"]))
    torch.testing.assert_close(gate(u, h), a * u + (1 - a) * h)


def test_gate_initialisation(gate: SelectiveGate) -> None:
    torch.testing.assert_close(gate.A_log, torch.log(torch.arange(1.0, 65.0)))
    delta = torch.nn.functional.softplus(gate.delta_proj.bias)
    assert delta.min() >= 0.001 and delta.max() <= 0.1001
    assert gate.delta_proj.weight.abs().max() <= 4**-0.5
    other = SelectiveGate(64)
    other.reset_parameters(torch.Generator().manual_seed(3))
    assert all(
        torch.equal(a, b) for a, b in zip(gate.parameters(), other.parameters(), strict=True)
    )


def test_gate_keeps_and_takes(gate: SelectiveGate) -> None:
    """A very negative bias opens the gate (the update is taken), a large one closes it."""
    u, h = torch.randn(2, 64), torch.randn(2, 64)
    with torch.no_grad():
        gate.delta_proj.bias.fill_(-50)
        torch.testing.assert_close(gate(u, h), u)
        gate.delta_proj.bias.fill_(100)
        torch.testing.assert_close(gate(u, h), h)


def exit_depth(rule: HaltingRule, confidences: list[float], lengths: list[float]) -> int:
    tracker = ExitTracker(rule, 1)
    for depth, (q, length) in enumerate(zip(confidences, lengths, strict=True), start=1):
        values = {"confidence": torch.tensor([q]), "step_length": torch.tensor([length])}
        if tracker.update(depth, rule.evidence(values)).item():
            return depth
    raise AssertionError("it did not exit")


def rule(strategy: str = "threshold", **fields: float) -> HaltingRule:
    defaults = {
        "exit_threshold": 0.6,
        "exit_interval": 1,
        "min_loops": 1,
        "max_loops": 4,
        "convergence_epsilon": 0.5,
    }
    return HaltingRule(strategy=strategy, **{**defaults, **fields})


@pytest.mark.parametrize(
    ("halting", "expected"),
    [
        (rule(), 2),
        (rule(exit_interval=3), 3),
        (rule(min_loops=3), 3),
        (rule(exit_threshold=1.0), 4),
        (rule(exit_threshold=0.7), 3),  # equal to the threshold is not above it
        (rule("cdf"), 2),  # 1 - 0.5 * 0.3 = 0.85 at depth 2
        (rule("cdf", exit_threshold=0.9), 3),
        (rule("cdf", exit_threshold=0.9, exit_interval=2), 4),
        (rule("cdf", exit_threshold=1.0), 4),
        (rule("convergence"), 3),
        (rule("convergence", exit_interval=4), 3),  # looks at every depth
        (rule("convergence", convergence_epsilon=0.0), 4),
    ],
)
def test_halting(halting: HaltingRule, expected: int) -> None:
    assert exit_depth(halting, [0.5, 0.7, 0.8, 0.1], [2.0, 1.0, 0.4, 0.3]) == expected


@given(
    confidences=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    threshold=st.floats(0, 2),
    interval=st.integers(1, 7),
    minimum=st.integers(1, 6),
    strategy=st.sampled_from(["threshold", "cdf"]),
)
def test_halting_bounds(
    confidences: list[float], threshold: float, interval: int, minimum: int, strategy: str
) -> None:
    halting = rule(
        strategy,
        exit_threshold=threshold,
        exit_interval=interval,
        min_loops=minimum,
        max_loops=6,
    )
    depth = exit_depth(halting, confidences, [1.0] * 6)
    assert minimum <= depth <= 6
    assert depth == 6 or (depth % interval == 0 and threshold < 1)


@given(
    confidences=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    lengths=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    threshold=st.floats(0, 2),
    interval=st.integers(1, 7),
    budgets=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted),
    strategy=st.sampled_from(["threshold", "cdf", "convergence"]),
)
def test_what_is_predetermined_is_what_the_rule_decides(
    confidences: list[float],
    lengths: list[float],
    threshold: float,
    interval: int,
    budgets: list[int],
    strategy: str,
) -> None:
    """The evidence can be left out, and need not be accumulated, where the decision is known."""
    knobs: Any = {
        "exit_threshold": threshold,
        "min_loops": budgets[0],
        "max_loops": budgets[1],
    }
    halting = rule(strategy, exit_interval=interval, **knobs)
    depth = exit_depth(halting, confidences, lengths)
    carry = new_carry(halting, 1)
    for at in range(1, 7):
        decision = halting.predetermined(at, **knobs)
        if decision is None:
            values = {
                "confidence": torch.tensor([confidences[at - 1]]),
                "step_length": torch.tensor([lengths[at - 1]]),
            }
            exits, carry = halting.exits(at, halting.evidence(values), carry)
            decision = bool(exits.item())
        if decision:
            assert at == depth
            return
    raise AssertionError("it did not exit")


@pytest.mark.parametrize(
    ("halting", "decisions"),
    [
        (rule(), [None, None, None, True]),
        (rule(min_loops=3), [False, False, None, True]),
        (rule("cdf", min_loops=3), [None, None, None, True]),  # adds up from the first depth on
        (rule("cdf", min_loops=4), [False, False, False, True]),
        (rule("cdf", exit_interval=2), [False, None, False, True]),
        (rule(exit_threshold=1.0), [False, False, False, True]),
        (rule("convergence", exit_interval=4, min_loops=2), [False, None, None, True]),
    ],
)
def test_predetermined(halting: HaltingRule, decisions: list[bool | None]) -> None:
    knobs: Any = {
        name: getattr(halting, name) for name in ("exit_threshold", "min_loops", "max_loops")
    }
    assert [halting.predetermined(depth, **knobs) for depth in range(1, 5)] == decisions


def test_rows_with_their_own_depth_and_knobs() -> None:
    """One call for rows at different depths equals a call each."""
    depths = torch.tensor([1, 2, 4])
    thresholds, minimum = torch.tensor([0.2, 0.9, 0.9]), torch.tensor([2, 1, 1])
    knobs = {"exit_threshold": thresholds, "min_loops": minimum, "max_loops": torch.tensor([4] * 3)}
    q = torch.tensor([0.5, 0.95, 0.1])
    together, _ = rule().with_knobs(**knobs).exits(depths, q, torch.zeros(3, 0))
    assert together.tolist() == [False, True, True]


def test_the_confidence_head_tells_high_confidences_apart_in_bfloat16() -> None:
    """bfloat16 itself has steps of 0.004 below 1."""
    torch.manual_seed(0)
    head = ConfidenceHead(64)
    states = torch.randn(400, 64)
    with torch.no_grad():
        head[1].weight.normal_(0, 0.2), head[1].bias.fill_(7.0)
        exact = torch.sigmoid(head(states))
        told = torch.sigmoid(head.to(torch.bfloat16)(states.to(torch.bfloat16)))
    assert told.dtype == torch.float32
    assert len(told[told > 0.996].unique()) > 50
    torch.testing.assert_close(told, exact, atol=2e-3, rtol=0)
