"""The simulated policy, on cases that can be counted by hand."""

from dataclasses import replace

import numpy as np
import pytest

from vllm_loopus.bench.policy import Costs, Policy, best, geometric, simulate

COSTS = Costs(c0=10, c1=1, d0=5, d1=2, d2=0.5)


def test_geometric_has_the_mean_that_is_asked_for() -> None:
    for mean in (1.5, 3, 5, 8):
        law = geometric(mean, 8)
        assert law.sum() == pytest.approx(1)
        assert law @ np.arange(1, 9) == pytest.approx(mean)


@pytest.mark.parametrize("kv", ["exact", "last_exited"])
def test_one_sequence_at_one_depth(kv: str) -> None:
    found = simulate(COSTS, [[2, 2, 2]], 1, Policy(kv, 1, 2, 1.0))
    # Six passes of one row; each boundary has one token and one row.
    assert (found.passes, found.rows) == (2, 1)
    assert found.rate == pytest.approx(1e3 * 3 / (6 * 11 + 3 * 7.5))


@pytest.mark.parametrize("kv", ["exact", "last_exited"])
def test_a_decoder_without_kv_has_nothing_to_catch_up(kv: str) -> None:
    """Each token has one row in it, whatever the depths; with K/V, the prompt of ten as well."""
    costs, exits = replace(COSTS, c0=0, c1=0, d0=0, d1=0), [[2, 1, 2]]
    policy = Policy(kv, 1, 2, 1.0, decoder_attends=False)
    assert simulate(costs, exits, 10, policy).rate == pytest.approx(1e3 / costs.d2)
    assert simulate(costs, exits, 10, replace(policy, decoder_attends=True)).rate < 1e3 / costs.d2


def test_a_deeper_token_takes_the_ones_before_it_along() -> None:
    # Depths 1, 1, 2 after a prompt of one token, all planes of which are there: the third token's
    # second pass has the second token's row too.
    found = simulate(COSTS, [[1, 1, 2]], 1, Policy("exact", 1, 2, 1.0))
    assert found.passes * 3 == pytest.approx(2 + 1 + 2)
    assert found.rows * found.passes * 3 == pytest.approx(2 + 1 + 1 + 2)
    taken_over = simulate(COSTS, [[1, 1, 2]], 1, Policy("last_exited", 1, 2, 1.0))
    assert taken_over.rows == 1


def test_a_lazy_prompt_goes_no_deeper_than_its_first_token() -> None:
    def rows_and_passes(kv: str, exits: list[int], lazy: bool) -> tuple[float, float]:
        found = simulate(COSTS, [exits], 10, Policy(kv, 1, 4, 1.0, lazy))
        return found.rows * found.passes * len(exits), found.passes * len(exits)

    assert rows_and_passes("exact", [1, 1], lazy=True) == pytest.approx((10 + 1, 2))
    assert rows_and_passes("exact", [1, 1], lazy=False) == pytest.approx((40 + 1, 5))
    # The second token goes to depth 2 and takes the prompt along.
    for kv in ("exact", "last_exited"):
        assert rows_and_passes(kv, [1, 2], lazy=True) == pytest.approx((10 + 1 + 11, 3))


def test_boundaries_that_cost_much_are_shared() -> None:
    rng = np.random.default_rng(0)
    exits = rng.choice(np.arange(1, 9), (32, 20), p=geometric(3, 8)).tolist()
    for quorum in ("auto", None):
        found = []
        for d0 in (0, 500):
            costs = Costs(10, 0.1, d0, 0, 0)
            policy = Policy("last_exited", 16, 8)
            run = simulate(costs, exits, 4, policy) if quorum else best(costs, exits, 4, policy)[0]
            found.append(run.rows)
        # Who has left waits for the others: fewer rows share a pass.
        assert found[1] < found[0]
    cheap = Costs(10, 0.1, 1, 0, 0)
    rule = simulate(cheap, exits, 4, Policy("last_exited", 16, 8)).rate
    assert rule > 0.95 * best(cheap, exits, 4, Policy("last_exited", 16, 8))[0].rate
