"""What is measured on a borrowed GPU, in which order, and that it fits into the time."""

import importlib.util

import plan
import pytest


def flat(rounds: list[plan.Round]) -> list[plan.Measure]:
    return [measure for measures in rounds for measure in measures]


def test_names_are_unique_and_programs_are_there() -> None:
    measures = [*flat(plan.full()), plan.TRAINING]
    assert len({measure.name for measure in measures}) == len(measures)
    for measure in measures:
        assert importlib.util.find_spec(f"measures.{measure.module}") is not None
        assert 0 < measure.expected <= measure.seconds < plan.CALL


def test_the_plan_fits_into_a_lease_of_two_calls() -> None:
    *worth, compiled = plan.full()  # the last is for minutes that are left
    assert [measure.name for measure in compiled] == ["compiled_4b"]
    expected = [max(measure.expected for measure in measures) for measures in worth]
    assert plan.STARTS + sum(expected) <= plan.LEASE
    # And every call ends in time: 600 s is the most that one may take.
    assert plan.CALL < 600


def test_the_order_is_that_of_worth() -> None:
    modules = [measures[0].module for measures in plan.full()]
    assert list(dict.fromkeys(modules)) == [
        *("machine", "golden", "passes", "speed", "host", "compiled")
    ]
    names = [measure.name for measure in flat(plan.full())]
    assert names.index("passes_4b_graphs") > max(
        names.index(f"speed_{size}_{policy}") for size in plan.SIZES for policy in plan.POLICIES
    ), "what runs without graphs comes before what runs with them"
    golden = [m for m in plan.full() if m[0].module == "golden"]
    assert [len(measures) for measures in golden] == [3, 4], "side by side: they are not timed"
    assert "golden_qwen3_v2" in [measure.name for measure in golden[1]]


def test_a_dry_run_has_every_kind_of_measure() -> None:
    dry = flat(plan.chosen(None, on_cpu=True))
    kinds = {measure.module for measure in flat(plan.full())} | {"training"}
    assert {measure.module for measure in dry} == kinds
    assert all(measure.on_cpu for measure in dry)


def test_names_choose_and_unknown_ones_are_refused() -> None:
    (only,) = plan.chosen(["golden_phi3"], on_cpu=False)
    assert [measure.name for measure in only] == ["golden_phi3"]
    assert flat(plan.chosen(["training"], on_cpu=False)) == [plan.TRAINING]
    with pytest.raises(ValueError, match="--only golden: no such measure; there are machine"):
        plan.chosen(["golden"], on_cpu=False)
