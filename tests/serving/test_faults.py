"""Faults that the shared server stands, and clocks that jump; whole runs are
`python -m tests.load`."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

import vllm_loopus
from tests.asynchronous import run as run_async
from tests.load import bodies, scenarios
from tests.load.server import Served
from tests.serving.test_early_exit import MIXED, assert_golden, by_rule, generate, start

HOUR = 3600


@pytest.mark.faults
def test_clients_that_hang_up(address: str) -> None:
    outcome = run_async(scenarios.hung_up(Served(address), 5, 8, 20, seed=0))
    assert outcome.tally.good and not outcome.problems, outcome


def test_bodies_of_100_000_entries(address: str) -> None:
    outcome = run_async(bodies.refused(address, 100_000))
    assert outcome.tally.good and not outcome.problems, outcome


def test_clocks_that_jump(make_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and back by an hour between any two looks at them."""
    backbone, rule = MIXED[0]
    llm, rng, now = start(make_llm, MIXED[0]), random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + rng.choice([-HOUR, 0, HOUR]))
    cases = by_rule(backbone)[rule]
    assert_golden(cases, generate(llm, cases))


def test_serving_does_not_read_the_wall_clock() -> None:
    for file in (Path(vllm_loopus.__file__).parent / "serving").rglob("*.py"):
        assert "time.time(" not in file.read_text() and "datetime" not in file.read_text(), file
