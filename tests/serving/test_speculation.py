"""Guessed positions: the answers are the golden ones, whatever was guessed.

In each run some guesses were right and some wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest

from tests.conftest import admit_too_many, counter, runner_of, spy_on_steps
from tests.serving.test_early_exit import (
    LONG,
    MIXED,
    SETTINGS,
    assert_golden,
    assert_golden_in_any_order,
    by_rule,
    generate,
    name_of,
    params_of,
    pool,
    start,
)
from vllm_loopus import exit_depths

# Draft depth and lookahead.
WAVES = [(1, 1), (1, 7), (2, 3), (3, 8)]
waves = pytest.mark.parametrize("wave", WAVES, ids=lambda wave: "{}-{}".format(*wave))


def speculating(make_llm: Any, setting: Any, wave: tuple[int, int], **args: Any) -> Any:
    draft_depth, lookahead = wave
    speculate = {"draft_depth": draft_depth, "lookahead": lookahead}
    return start(make_llm, setting, {"speculate": speculate, **args.pop("loopus", {})}, **args)


def outcomes(llm: Any) -> tuple[int, int]:
    """Guesses so far that were right, and wrong."""
    names = "confirmed_guesses", "rejected_guesses"
    right, wrong = (
        sum(m.value for m in llm.get_metrics() if m.name == f"vllm:loopus_{name}") for name in names
    )
    return int(right), int(wrong)


@contextmanager
def both_outcomes(llm: Any) -> Iterator[None]:
    """Inside, guesses turn out right, and others wrong."""
    before = outcomes(llm)
    yield
    right, wrong = (now - then for now, then in zip(outcomes(llm), before, strict=True))
    assert right > 0 and wrong > 0, (right, wrong)


@waves
@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_alone_and_in_one_batch(make_llm: Any, setting: Any, wave: tuple[int, int]) -> None:
    llm = speculating(make_llm, setting, wave, enable_prefix_caching=False)
    cases = by_rule(setting[0])[setting[1]]
    for case in cases[:3]:
        assert_golden([case], generate(llm, [case]))
    with both_outcomes(llm):
        assert_golden(cases, generate(llm, cases))
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1
