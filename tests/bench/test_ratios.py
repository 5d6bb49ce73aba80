"""Ratios over rounds: their median and its 95 % interval."""

import math

import pytest

from vllm_loopus.bench.ratios import Ratio

# Student's t, two-sided, 95 %, from printed tables: by degrees of freedom, one less than rounds.
STUDENT = {1: 12.7062, 9: 2.2622, 10: 2.2281, 29: 2.0452}


@pytest.mark.parametrize("rounds", [2, 10, 11, 30])
def test_the_interval_is_by_student_with_the_degrees_of_freedom_of_the_rounds(rounds: int) -> None:
    logarithms = [(-1) ** number * 0.1 for number in range(rounds)]
    mean = sum(logarithms) / rounds
    variance = sum((value - mean) ** 2 for value in logarithms) / (rounds - 1)
    half = STUDENT[rounds - 1] * math.sqrt(variance / rounds)
    ratio = Ratio.of([math.exp(value) for value in logarithms])
    assert math.log(ratio.high / ratio.median) == pytest.approx(half, rel=1e-4)
    assert math.log(ratio.median / ratio.low) == pytest.approx(half, rel=1e-4)
    assert ratio.rounds == rounds


def test_one_round_and_equal_rounds_have_no_spread() -> None:
    assert Ratio.of([2.0]) == Ratio(2.0, 2.0, 2.0, 1)
    same = Ratio.of([2.0] * 20)
    assert (same.low, same.high) == (2.0, 2.0)
    assert same.agrees(Ratio.of([2.0, 2.0])) and not same.agrees(Ratio.of([2.1, 2.1]))
    assert same.agrees(Ratio.of([2.0])) is None


def test_ratios_are_taken_within_rounds() -> None:
    # The machine slows down by a third; the ratio stays.
    ratio = Ratio.over([20, 20 / 1.5, 20], [10, 10 / 1.5, 10])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    assert Ratio(2, 1.9, 2.1, 3).agrees(Ratio(2.2, 2.1, 2.3, 3))
    assert not Ratio(2, 1.9, 2.05, 3).agrees(Ratio(2.2, 2.1, 2.3, 3))
    with pytest.raises(ValueError, match="shorter"):
        Ratio.over([1.0, 2.0], [1.0])
