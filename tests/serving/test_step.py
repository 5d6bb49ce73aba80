"""What one step runs as one call, and what it writes, on a fake model."""

from typing import Any

import pytest

from tests.serving.fake_executor import answer
from tests.serving.fakes import Engine


@pytest.mark.parametrize("kv_policy", ["exact", "last_exited"])
@pytest.mark.parametrize(
    ("knobs", "exit_interval", "longest"),
    [
        ({"min_loops": 4}, 1, 4),  # early exit off
        ({"min_loops": 3}, 1, 3),
        ({}, 1, 1),
        ({"max_loops": 3}, 2, 2),
    ],
)
def test_passes_with_nothing_to_decide_in_between_are_one_call(
    kv_policy: str, knobs: dict[str, int], exit_interval: int, longest: int
) -> None:
    engine = Engine(kv_policy=kv_policy, exit_interval=exit_interval, quorum=1.0)
    for index in range(3):
        engine.add(f"r{index}", [index, 1, 2, 3, 4], 9, **knobs)
    engine.run()
    assert engine.runner.executor.longest_run == longest
    for index in range(3):
        budgets = knobs.get("max_loops", 4), knobs.get("min_loops", 1)
        tokens, depths = answer([index, 1, 2, 3, 4], 9, 4, *budgets, exit_interval)
        assert engine.outputs[f"r{index}"] == tokens
        assert engine.depths[f"r{index}"] == depths


def test_given_depths_stand_for_what_a_head_would_say() -> None:
    """A replay saves no call: nothing is to be known of it beforehand."""
    engine = Engine(quorum=1.0)
    engine.add("r", [1, 2, 3], 3, exit_threshold=1.0, exit_depths=[4, 3, 4])
    engine.run()
    assert engine.depths["r"] == [4, 3, 4]
    assert engine.runner.executor.longest_run == 1


def test_the_boundary_rule_is_asked_after_each_pass_while_somebody_waits() -> None:
    """`slow` has nothing to decide before its fourth pass, but `quick` has left after the first."""
    engine = Engine(quorum=1.0, max_num_seqs=2)
    engine.add("slow", [1, 2, 3], 6, min_loops=4)
    engine.add("quick", [4, 5, 6], 6, max_loops=1)
    engine.step()
    assert engine.runner.executor.passes == 4
    assert engine.runner.executor.longest_run == 1
    assert len(engine.outputs["quick"]) == len(engine.outputs["slow"]) == 1


@pytest.mark.parametrize(
    ("knobs", "interval", "exits"),
    [
        ({}, 1, [1, 2, 3, 4]),
        ({"min_loops": 3}, 1, [3, 4]),
        ({"min_loops": 4}, 1, [4]),
        ({"max_loops": 3}, 2, [2, 3]),
        ({"min_loops": 4, "exit_depths": [2, 4]}, 1, [2, 4]),
    ],
)
def test_the_decoder_fills_the_depths_to_leave_at(
    knobs: dict[str, Any], interval: int, exits: list[int]
) -> None:
    engine = Engine(kv_policy="last_exited", exit_interval=interval)
    engine.add("r", [1, 2, 3], 3, **knobs)
    engine.step()
    engine.step()
    stairs, index = engine.row("r")
    executor, newest = engine.runner.executor, stairs.done[index, 0] - 1
    filled = [
        depth
        for depth in range(1, stairs.max_depth[index] + 1)
        if ("decoder", executor.slot(index, depth, newest)) in executor.memory
    ]
    assert filled == exits
