"""The simulated waves: small cases that can be counted by hand."""

import pytest

from vllm_loopus.bench.policy import Costs
from vllm_loopus.bench.waves import simulate_waves

FREE_ROWS = Costs(c0=1.0, c1=0.0, d0=0.0, d1=0.0, d2=0.0)
TOKENS = 20


@pytest.mark.parametrize(("draft_depth", "each"), [(1, 1), (2, 2), (4, 4)])
def test_a_token_each_draft_depth_if_all_guesses_are_right(draft_depth: int, each: int) -> None:
    found = simulate_waves(FREE_ROWS, [[8] * TOKENS], [[1] * TOKENS], 1, draft_depth, 7)
    assert found.passes * TOKENS == pytest.approx(8 + (TOKENS - 1) * each)


def test_lookahead_bounds_what_is_in_flight() -> None:
    """With one position ahead, two tokens share the passes of one."""
    found = simulate_waves(FREE_ROWS, [[8] * TOKENS], [[1] * TOKENS], 1, 1, 1)
    assert found.passes * TOKENS == pytest.approx(8 * TOKENS / 2 + 1)
    assert found.rows <= 2


def test_wrong_guesses_bring_nothing() -> None:
    found = simulate_waves(FREE_ROWS, [[8] * TOKENS], [[0] * TOKENS], 1, 1, 7)
    assert found.passes == 8
    assert found.rows > 2  # and cost rows


def test_positions_that_exited_come_along() -> None:
    """The second token exits at 1, the third one at 3: it takes the second along."""
    found = simulate_waves(FREE_ROWS, [[3, 1, 3]], [[1, 1, 1]], 1, 1, 7)
    # Passes: 3@1; 3@2 4@1; 3@3 5@1; then 5@2 with 4, 5@3 with 4.
    assert found.passes * 3 == pytest.approx(5)
    assert found.passes * 3 * found.rows == pytest.approx(1 + 2 + 2 + 2 + 2)


def test_what_exited_behind_gives_its_token_in_the_same_boundary() -> None:
    """The second token exits while the first one goes to 3: both leave after the third pass."""
    costs = Costs(c0=1.0, c1=0.0, d0=0.5, d1=0.0, d2=0.0)
    found = simulate_waves(costs, [[3, 1]], [[1, 1]], 1, 1, 7)
    assert 1e3 / found.rate * 2 == pytest.approx(3 * 1.0 + 2 * 0.5)


def test_a_boundary_where_anything_is_decoded() -> None:
    costs = Costs(c0=1.0, c1=0.0, d0=0.5, d1=0.0, d2=0.0)
    every = simulate_waves(costs, [[4] * TOKENS], [[1] * TOKENS], 1, 1, 7)
    assert 1e3 / every.rate * TOKENS == pytest.approx(1.5 * (4 + TOKENS - 1))
