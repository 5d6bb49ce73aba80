"""When guesses pay: the plan against costs and outcomes."""

import numpy as np

from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.step.wave_plan import AutoPlan

ONE, NONE = np.array([0]), np.zeros(0, dtype=np.int64)
FAST = StepCosts(per_pass=2.2e-3, per_boundary=0.8e-3, per_row=4e-6)  # a GPU
ROWS = StepCosts(per_pass=5e-3, per_boundary=5e-3, per_row=8e-3)  # rows cost as much as a pass


def planned(
    costs: StepCosts | None, count: int = 1, exits: int = 8, outcomes: str = ""
) -> AutoPlan:
    """A plan for `count` sequences after tokens of depth `exits`; outcomes are + and -, at 1."""
    plan = AutoPlan(8, 7)
    sequences = np.arange(count)
    for index in sequences.tolist():
        plan.add(index)
    for outcome in outcomes:
        plan.observe(ONE, np.array([1]), outcome == "+")
    for _ in range(10):
        plan.begin_step(sequences, np.full(count, exits), costs, seconds=0.02)
    return plan


def test_far_ahead_on_a_fast_device() -> None:
    plan = planned(FAST)
    assert plan.lookahead == 7 and plan.draft_depth == 1
    assert plan.allows(ONE).all()


def test_not_where_rows_cost_as_much_as_they_save() -> None:
    assert planned(ROWS, count=64).lookahead == 0
    assert not planned(ROWS, count=64).allows(np.arange(64)).any()


def test_not_before_it_is_known_what_steps_take_without() -> None:
    plan = AutoPlan(8, 7)
    plan.add(0)
    for _ in range(AutoPlan.FIRST):
        plan.begin_step(ONE, np.array([8]), FAST, seconds=0.02)
        assert not plan.lookahead
    plan.begin_step(ONE, np.array([8]), FAST, seconds=0.02)
    assert plan.lookahead


def test_where_no_pass_can_be_timed() -> None:
    assert planned(None).lookahead == 7


def test_guesses_that_turn_out_slower_rest() -> None:
    plan, guessed = planned(FAST), 0
    for _ in range(1000):
        slow = plan.lookahead > 0
        guessed += slow
        plan.begin_step(ONE, np.array([8]), FAST, seconds=0.03 if slow else 0.02)
    assert AutoPlan.TRIAL <= guessed < 200


def test_not_where_tokens_leave_at_once() -> None:
    assert planned(FAST, exits=1).lookahead == 0


def test_guesses_that_are_wrong_come_later_or_not_at_all() -> None:
    plan = planned(FAST, outcomes="-" * 60)
    assert plan._acceptance.at(1) < 0.2 < plan._acceptance.at(2)
    assert plan.draft_depth > 1
    for depth in range(1, 5):
        plan.observe(np.repeat(ONE, 60), np.full(60, depth), False)
    plan.begin_step(ONE, NONE, FAST)
    assert plan.lookahead == 0


def test_they_are_tried_again_after_a_while() -> None:
    plan = planned(FAST)
    for depth in range(1, 5):
        plan.observe(np.repeat(ONE, 60), np.full(60, depth), False)
    tried = 0
    for _ in range(5000):
        plan.begin_step(ONE, NONE, FAST)
        tried += plan.lookahead > 0
    assert 0 < tried < 5000


def test_sequences_that_guess_badly_do_not_guess() -> None:
    plan = planned(FAST, count=3)
    for _ in range(200):
        plan.observe(np.array([0, 2]), np.array([1, 1]), True)
        plan.observe(np.array([1]), np.array([1]), False)
    plan.begin_step(np.arange(3), NONE, FAST)
    assert plan.lookahead > 0
    assert plan.allows(np.arange(3)).tolist() == [True, False, True]
    plan.add(1)  # another sequence
    assert plan.allows(np.arange(3)).all()
