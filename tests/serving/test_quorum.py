"""The quorum rules and the costs they go by."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.serving.core import step_clock
from vllm_loopus.serving.core.step_clock import LinearCost, StepClock
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.messages.progress import LoopProgress, PassTimes
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.step import clock as clock_module
from vllm_loopus.serving.step.quorum import AutoQuorum, FixedQuorum, quorum_for
from vllm_loopus.serving.step.staircase import Staircases, Start

DEPTH = 8


class Running:
    """Sequences whose newest tokens, generated ones, have reached some depth."""

    def __init__(self, **options: Any) -> None:
        self.stairs = Staircases(DEPTH, **options)
        self.count = 0

    def add(
        self,
        depth: int,
        interval: int = 1,
        exit_depths: tuple[int, ...] = (),
        count: int = 1,
        prefill_end: int = 3,
        **knobs: float,
    ) -> np.ndarray:
        options: Any = {"max_loops": DEPTH, "min_loops": 1, "exit_threshold": 0.5, **knobs}
        halting = HaltingRule("cdf", 0.5, 1, DEPTH, interval, 0.0)
        start = Start(
            RequestKnobs(**options, exit_depths=exit_depths),
            DEPTH,
            prefill_end=prefill_end,
            predetermined=[halting.predetermined(at, **options) for at in range(1, DEPTH + 1)],
            cached=[3] * DEPTH,
        )
        index = np.arange(self.count, self.count + count)
        self.count += count
        self.stairs.reserve(self.count)
        for one in index:
            self.stairs.add(one, start)
        self.stairs.begin(index, 1, True)
        for _ in range(depth):
            self.stairs.advance(self.stairs.next_chunks(index))
        return index


def chance(rule: AutoQuorum, *args: Any, **options: Any) -> float:
    running = Running()
    return float(rule.chances(running.stairs, running.add(*args, **options))[0])


def ends(rule: Any, ready: int, *args: Any, count: int, **options: Any) -> bool:
    running = Running()
    index = running.add(*args, **options, count=count) if count else np.zeros(0, dtype=int)
    return rule.ends(ready, running.stairs, index)


def taught(chances: dict[int, float]) -> AutoQuorum:
    """A rule that has seen tokens leave with these chances."""
    rule, running = AutoQuorum(DEPTH), Running()
    index = running.add(0, count=100)
    for depth, share in chances.items():
        for _ in range(20):
            leaving = np.arange(100) < 100 * share
            rule.observe(running.stairs, index, np.full(100, depth), leaving)
    return rule


def test_given_depths_are_learned_like_those_of_a_head() -> None:
    """Also where the checkpoint's own head lets nobody leave, as in the benchmarks."""
    rule = AutoQuorum(DEPTH)
    running = Running()
    index = np.concatenate(
        [running.add(0, exit_threshold=1.0, exit_depths=(d, d)) for d in (2, 3) * 50]
    )
    stairs = running.stairs
    for _ in range(10):
        stairs.begin(index, 1, True)
        for depth in range(1, 4):
            going = index[stairs.undecided(index)]
            at = np.full(len(going), depth)
            leaving = stairs.decide(going, at, np.zeros(len(going), dtype=bool))
            rule.observe(stairs, going, at, leaving)
    given = [chance(rule, depth, exit_depths=(7,), exit_threshold=1.0) for depth in range(3)]
    assert given == pytest.approx([0.0, 0.5, 1.0], abs=0.05)
    assert chance(rule, 1, exit_threshold=1.0) == 0.0
    assert chance(rule, 1, exit_depths=(7,), min_loops=3) == 0.0
    assert chance(rule, 1, exit_depths=(2,), max_loops=2) == 1.0


@pytest.mark.parametrize(
    ("share", "ready", "running", "ends"),
    [(0.05, 1, 15, True), (0.5, 7, 9, False), (0.5, 8, 8, True), (1.0, 15, 1, False)],
)
def test_fixed(share: float, ready: int, running: int, ends: bool) -> None:
    rule = FixedQuorum(share)
    assert globals()["ends"](rule, ready, 1, count=running) == ends
    assert isinstance(quorum_for(share, DEPTH), FixedQuorum)


def test_what_is_known_of_a_budget() -> None:
    rule = taught({2: 0.3})
    assert chance(rule, 1) == pytest.approx(0.3, abs=0.05)
    assert chance(rule, 1, max_loops=2) == 1.0
    assert chance(rule, 1, min_loops=3) == 0.0
    assert chance(rule, 7) == 1.0
    assert chance(rule, 2, interval=2) == 0.0
    assert chance(rule, 1, exit_threshold=1.0) == 0.0


def test_waits_for_those_who_are_about_to_leave() -> None:
    rule = AutoQuorum(DEPTH)
    rule.begin_step(StepCosts(per_pass=2.0, per_boundary=1.0))
    assert not ends(rule, 4, 7, count=12)
    rule.begin_step(StepCosts(per_pass=2.0, per_boundary=1.0))
    assert ends(rule, 4, 2, min_loops=8, count=12)
    assert ends(rule, 4, 1, count=0)


def test_dear_boundaries_are_shared_by_more() -> None:
    def share_at_the_end(per_boundary: float) -> int:
        rule = taught(dict.fromkeys(range(1, DEPTH), 0.3))
        rule.begin_step(StepCosts(per_pass=1.0, per_boundary=per_boundary))
        ready = 1
        while not ends(rule, ready, 2, count=16 - ready):
            ready += 1
        return ready

    assert share_at_the_end(0.01) < share_at_the_end(2.0) < share_at_the_end(20.0)


def foresees(rule: AutoQuorum, count: int, ready: int = 0, called: bool = False) -> bool:
    running = Running()
    return rule.foresees(ready, running.stairs, running.add(2, count=count), called)


def test_the_decoder_comes_before_the_exits_are_read_if_it_will_hardly_be_in_vain() -> None:
    rule = taught({2: 0.3})
    assert not foresees(rule, 64), "nothing has been measured"
    rule.begin_step(StepCosts(per_pass=2.0, per_boundary=1.0, gap=0.05))
    assert foresees(rule, 64)
    assert not foresees(rule, 2), "it may well be that nobody exits"
    assert foresees(rule, 2, ready=1)
    assert not foresees(rule, 1, called=True), "a step would probably sample nothing"
    assert foresees(rule, 2, called=True), "it runs for guesses in any case"
    assert not FixedQuorum(0.1).foresees(8, Running().stairs, np.zeros(0, dtype=int))


@pytest.mark.parametrize(("planes", "waits"), [(4, [0, 0, 0, 0.3, 0.3, 0.3, 0.3, 1]), (8, 7 * [0])])
def test_a_prompt_that_fills_is_ready_at_its_last_plane(planes: int, waits: list[float]) -> None:
    """Of two prompts one exits at depth 2. The other may exit at any depth."""
    rule = taught(dict.fromkeys(range(1, DEPTH), 0.3))
    running = Running(full_prefill=True, planes=planes)
    stairs, index = running.stairs, running.add(0, count=2, prefill_end=4)
    for depth, expected in enumerate([*waits, 1][:DEPTH], start=1):
        early, late = rule.chances(stairs, index)
        assert late == pytest.approx(expected, abs=0.05)
        stairs.advance(stairs.next_chunks(index))
        if depth == 2:
            stairs.decide(index[:1], np.array([depth]), np.array([True]))
        if depth <= planes:
            assert early == stairs.ready(index)[0] == (depth == planes)


@pytest.mark.parametrize(("host", "passes"), [(0.5, 1), (2.0, 1), (4.5, 2), (7.0, 3)])
def test_passes_are_launched_in_chains_where_the_host_is_slower(host: float, passes: int) -> None:
    rule, running = taught(dict.fromkeys(range(1, DEPTH), 0.3)), Running()
    index = running.add(2, count=64)
    assert rule.chain(running.stairs, index) == 1, "nothing has been measured"
    rule.begin_step(StepCosts(per_pass=2.0, per_boundary=0.5, host=host))
    assert rule.chain(running.stairs, index) == passes


def test_costs_are_learned() -> None:
    cost = LinearCost()
    assert cost.fixed is None
    for size in (4, 8, 16, 5, 9, 30):
        cost.add(size, 3.0 + 0.5 * size)
    assert cost.fixed == pytest.approx(3.0, rel=0.1)
    assert cost.at(10) == pytest.approx(8.0, rel=0.05)


def test_costs_that_cannot_be_told_apart() -> None:
    cost = LinearCost()
    for _ in range(20):
        cost.add(8, 1.0)
    assert cost.fixed is None
    cost = LinearCost()
    for size in (4, 8, 16, 5, 9, 30):
        cost.add(size, 0.5 * size - 1.0)  # a negative part
    assert cost.fixed is not None and 0 < cost.fixed < 1


def progress(passes: list[int], seconds: list[float | None], boundary_rows: int) -> LoopProgress:
    return LoopProgress(
        boundary_rows=boundary_rows, times=PassTimes(seconds), stats=LoopStats(passes=passes)
    )


def test_prompts_do_not_hide_what_a_boundary_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes by the rows of encoder and decoder: a prompt gives one token and has many."""
    now = 0.0
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = StepClock()
    clock.begin()
    for rows in (8, 12, 10, 140, 9, 11, 12):
        passes = [4, 9]
        seconds: list[float | None] = [10.0 + n for n in passes]
        now += sum(10.0 + n for n in passes) + 8.0 + 0.1 * rows
        clock.end(progress(passes, seconds, boundary_rows=rows), idle=False)
        clock.begin()
    learned = clock.costs()
    assert learned is not None
    assert learned.per_boundary == pytest.approx(8.0, rel=0.1)
    assert learned.per_pass == pytest.approx(10.0, rel=0.1)
    assert learned.per_row == pytest.approx(1.0, rel=0.3)
    now += 50.0  # a step without a boundary says nothing of one
    clock.end(progress([4], [50.0], boundary_rows=0), idle=False)
    clock.begin()
    after = clock.costs()
    assert after is not None and after.per_boundary == learned.per_boundary


def test_a_pass_that_was_not_timed_is_taken_to_be_like_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = StepClock()
    clock.begin()
    for rows in (4, 9, 5, 30, 8, 12, 7):
        now += 3.0 + 0.5 * rows + 2.0
        clock.end(progress([rows], [3.0 + 0.5 * rows], boundary_rows=rows), idle=False)
        clock.begin()
    before = clock.costs()
    assert before is not None and before.per_pass == pytest.approx(3.0, rel=0.1)
    for rows in (4, 9, 5, 30, 8, 12, 7):
        now += 3.0 + 0.5 * rows + 2.0
        clock.end(progress([rows], [None], boundary_rows=rows), idle=False)
        clock.begin()
    after = clock.costs()
    assert after is not None and after.per_pass == before.per_pass
    assert after.per_boundary == pytest.approx(before.per_boundary, rel=0.15)


def test_a_device_is_timed_by_the_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = clock_module.DeviceClock(asynchronous=True)

    def wait(seconds: float, more: bool = False) -> list[float]:
        nonlocal now
        with clock.waiting(more) as known:
            now += seconds
        return known

    now += 1.0
    clock.launch(idle=True)
    now += 0.5  # the host does something else
    assert wait(2.0) == [2.5], "from its launch on"
    clock.launch(idle=False)
    clock.launch(idle=False)
    now += 1.0
    assert wait(3.0) == [4.0]
    assert wait(0.0, more=True) == [], "another result of the same call"
    assert wait(2.0) == [2.0], "it began when the one before ended"
    now += 5.0
    assert wait(0.0) == [], "it was over before the host looked"
    assert wait(1.0) == [], "so it is not known when this one began"
    assert clock.gap == 0.0
    clock.launch(idle=True)
    assert wait(1.0) == [1.0]
    now += 0.25
    clock.launch(idle=True)
    assert clock.gap > 0.0


def test_the_host_is_what_is_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1.0
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = clock_module.DeviceClock(asynchronous=True)
    for _ in range(3):
        clock.step()
        now += 0.5
        with clock.waiting():
            now += 2.0
        now += 0.5
    assert clock.host == pytest.approx(1.0)
    now += 1000.0  # nothing was to be done
    clock.step()
    assert clock.host == pytest.approx(1.0)
