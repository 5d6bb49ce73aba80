"""The quorum rules and the costs they go by."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.serving.core import step_clock
from vllm_loopus.serving.core.step_clock import LinearCost, StepClock
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.messages.progress import LoopProgress, PassTimes
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.step.quorum import AutoQuorum, FixedQuorum, quorum_for
from vllm_loopus.serving.step.staircase import LoopedSequence

DEPTH = 8


def in_flight(
    depth: int, interval: int = 1, exit_depths: tuple[int, ...] = (), **knobs: float
) -> LoopedSequence:
    """A sequence whose newest token, a generated one, has reached `depth`."""
    options: Any = {"max_loops": DEPTH, "min_loops": 1, "exit_threshold": 0.5, **knobs}
    halting = HaltingRule("cdf", 0.5, interval, 1, DEPTH, 0.0)
    sequence = LoopedSequence(
        "r",
        RequestKnobs(**options, exit_depths=exit_depths),
        DEPTH,
        prefill_end=3,
        cached=[3] * DEPTH,
        predetermined=[halting.predetermined(at, **options) for at in range(1, DEPTH + 1)],
    )
    sequence.begin(1, wants_token=True)
    for _ in range(depth):
        (chunk,) = sequence.next_chunks()
        sequence.advance(chunk)
    return sequence


def taught(chances: dict[int, float]) -> AutoQuorum:
    """A rule that has seen tokens leave with these chances."""
    rule = AutoQuorum(DEPTH)
    for depth, chance in chances.items():
        for number in range(2000):
            sequence = in_flight(0)
            sequence.exit_depth = depth if number % 100 < 100 * chance else None
            rule.observe(sequence, depth)
    return rule


def test_given_depths_are_learned_like_those_of_a_head() -> None:
    """Also where the checkpoint's own head lets nobody leave, as in the benchmarks."""
    rule = AutoQuorum(DEPTH)
    for depths in ((2, 2), (3, 3)) * 500:
        sequence = in_flight(0, exit_threshold=1.0, exit_depths=depths)
        for depth in range(1, depths[0] + 1):
            sequence.decide(depth, exits=False)
            rule.observe(sequence, depth)
    given = [
        rule.chance(in_flight(depth, exit_depths=(7,), exit_threshold=1.0)) for depth in range(3)
    ]
    assert given == pytest.approx([0.0, 0.5, 1.0], abs=0.05)
    assert rule.chance(in_flight(1, exit_threshold=1.0)) == 0.0
    assert rule.chance(in_flight(1, exit_depths=(7,), min_loops=3)) == 0.0
    assert rule.chance(in_flight(1, exit_depths=(2,), max_loops=2)) == 1.0


@pytest.mark.parametrize(
    ("share", "ready", "running", "ends"),
    [(0.05, 1, 15, True), (0.5, 7, 9, False), (0.5, 8, 8, True), (1.0, 15, 1, False)],
)
def test_fixed(share: float, ready: int, running: int, ends: bool) -> None:
    assert FixedQuorum(share).ends(ready, [in_flight(1)] * running) == ends
    assert isinstance(quorum_for(share, DEPTH), FixedQuorum)


def test_what_is_known_of_a_budget() -> None:
    rule = taught({2: 0.3})
    assert rule.chance(in_flight(1)) == pytest.approx(0.3, abs=0.05)
    assert rule.chance(in_flight(1, max_loops=2)) == 1.0
    assert rule.chance(in_flight(1, min_loops=3)) == 0.0
    assert rule.chance(in_flight(7)) == 1.0
    assert rule.chance(in_flight(2, interval=2)) == 0.0
    assert rule.chance(in_flight(1, exit_threshold=1.0)) == 0.0


def test_waits_for_those_who_are_about_to_leave() -> None:
    rule = AutoQuorum(DEPTH)
    rule.begin_step(StepCosts(per_pass=2.0, per_boundary=1.0))
    assert not rule.ends(4, [in_flight(7)] * 12)
    rule.begin_step(StepCosts(per_pass=2.0, per_boundary=1.0))
    assert rule.ends(4, [in_flight(2, min_loops=8)] * 12)
    assert rule.ends(4, [])


def test_dear_boundaries_are_shared_by_more() -> None:
    def share_at_the_end(per_boundary: float) -> int:
        rule = taught(dict.fromkeys(range(1, DEPTH), 0.3))
        rule.begin_step(StepCosts(per_pass=1.0, per_boundary=per_boundary))
        ready = 1
        while not rule.ends(ready, [in_flight(2)] * (16 - ready)):
            ready += 1
        return ready

    assert share_at_the_end(0.01) < share_at_the_end(2.0) < share_at_the_end(20.0)


def test_costs_are_learned() -> None:
    cost = LinearCost()
    assert cost.fixed is None
    for size in (4, 8, 16, 5, 9, 30):
        cost.add(size, 3.0 + 0.5 * size)
    assert cost.fixed == pytest.approx(3.0)


def test_costs_that_cannot_be_told_apart() -> None:
    cost = LinearCost()
    for _ in range(20):
        cost.add(8, 1.0)
    assert cost.fixed is None
    cost = LinearCost()
    for size in (4, 8, 16, 5, 9, 30):
        cost.add(size, 0.5 * size - 1.0)  # a negative part
    assert cost.fixed is not None and 0 < cost.fixed < 1


def progress(
    passes: list[int], seconds: list[float], boundary_rows: int, waited: bool = True
) -> LoopProgress:
    times = PassTimes(seconds, [waited] * len(passes), ended_idle=waited)
    return LoopProgress(boundary_rows=boundary_rows, times=times, stats=LoopStats(passes=passes))


def test_prompts_do_not_hide_what_a_boundary_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes by the rows of encoder and decoder: a prompt gives one token and has many."""
    now = 0.0
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = StepClock()
    clock.begin()
    for rows in (8, 12, 10, 140, 9, 11, 12):
        passes = [4, 9]
        seconds = [10.0 + n for n in passes]
        now += sum(seconds) + 8.0 + 0.1 * rows
        clock.end(progress(passes, seconds, boundary_rows=rows), idle=False)
        clock.begin()
    learned = clock.costs()
    assert learned is not None
    assert learned.per_boundary == pytest.approx(8.0) and learned.per_pass == pytest.approx(10.0)
    now += 50.0  # a step without a boundary says nothing of one
    clock.end(progress([4], [50.0], boundary_rows=0), idle=False)
    clock.begin()
    # Nor does one in which the device still ran the passes.
    now += 90.0
    clock.end(progress([4], [1e-5], boundary_rows=8, waited=False), idle=False)
    clock.begin()
    after = clock.costs()
    assert after is not None and after.per_boundary == learned.per_boundary


def test_passes_that_nobody_waited_for_teach_nothing() -> None:
    """On a GPU their time is that of the launch."""
    clock = StepClock()
    for rows in (4, 9, 5, 30, 8, 12, 7):
        clock.end(progress([rows], [3.0 + 0.5 * rows], boundary_rows=0), idle=False)
    learned = clock._passes.fixed
    assert learned == pytest.approx(3.0)
    clock.end(progress([64] * 50, [1e-5] * 50, boundary_rows=0, waited=False), idle=False)
    assert clock._passes.fixed == learned
