"""Guessed positions of one sequence, by hand."""

import numpy as np

from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.step.staircase import Staircases, Start
from vllm_loopus.serving.step.wave import Waves
from vllm_loopus.serving.step.wave_plan import WavePlan

ONE = np.array([0])


def wave() -> tuple[Staircases, Waves]:
    """A certain position at depth 1, and one that begins with its guess."""
    stairs = Staircases(num_depths=4, slots=4)
    stairs.add(0, Start(RequestKnobs(4, 1, 0.5), 4, 3, [None] * 4))
    stairs.lookahead[0] = 2
    stairs.advance(stairs.begin(ONE, 3, True).at(1))
    waves = Waves(stairs, WavePlan(1, 2))
    nobody = np.zeros(1, dtype=bool)
    waves.begin(waves.to_decode(ONE, np.array([9]), nobody))
    return stairs, waves


def test_useless_states_of_a_guess_leave_the_certain_position_as_it_is() -> None:
    stairs, _ = wave()
    number = stairs.numbers[0, 0]
    assert stairs.ahead[0] == 1 and stairs.numbers[0, 1] != number
    assert not stairs.fail_at(0, 4, "NaN")
    assert stairs.spoiled[0] and not stairs.failed[0]
    assert stairs.ahead[0] == 0 and stairs.lookahead[0] == 0
    assert stairs.numbers[0, 0] == number, "the exit rule goes on with what it carries"
    assert stairs.fail_at(0, 3, "NaN") and stairs.failed[0]


def test_a_position_that_begins_again_is_another_one_to_the_exit_rule() -> None:
    stairs, waves = wave()
    guessed = stairs.numbers[0, 1]
    stairs.finish(ONE)
    waves.reject(ONE)
    stairs.begin(ONE, 1, True)
    assert stairs.numbers[0, 0] > guessed


def test_a_confirmed_guess_keeps_what_was_computed() -> None:
    stairs, waves = wave()
    guessed = stairs.numbers[0, 1]
    stairs.advance(waves.next_chunks(ONE))
    stairs.finish(ONE)
    waves.confirm(ONE)
    assert stairs.in_flight[0] and stairs.depth[0] == 1 and stairs.done[0, 0] == 4
    assert stairs.numbers[0, 0] == guessed and stairs.ahead[0] == 0


def test_nobody_guesses_who_may_not() -> None:
    """Even where the certain position may leave in the same call."""
    stairs, waves = wave()
    stairs.forget(ONE)
    stairs.lookahead[0] = 0
    assert not len(waves.to_decode(ONE, np.array([9]), np.ones(1, dtype=bool)))


def test_a_guess_that_came_with_its_token_was_none() -> None:
    """Also where guesses are counted in between: counters do not go down."""
    stairs, waves = wave()
    waves.drop(ONE)
    assert stairs.ahead[0] == 0 and waves.counted().made == 0
    stairs, waves = wave()
    assert waves.counted().made == 1
    waves.drop(ONE)
    assert waves.counted().made == 0
    waves.begin(waves.to_decode(ONE, np.array([9]), np.zeros(1, dtype=bool)))
    assert waves.counted().made == 0 and waves.counted().made == 0
