"""A short soak; `python -m tests.serving.soak --minutes 20` is the long one."""

from typing import Any

import pytest

from tests.conftest import GOLDEN
from tests.serving.soak import OPTIONS, TINY, answers_alone, requests, soak


@pytest.mark.faults
def test_soak(make_llm: Any) -> None:
    items = requests(20, seed=3)
    answers = answers_alone(
        make_llm(GOLDEN / "qwen3", **OPTIONS, enable_prefix_caching=False), items
    )
    report = soak(make_llm(GOLDEN / "qwen3", **OPTIONS, **TINY), items, answers, seconds=15, seed=3)
    assert not report.wrong and not report.blocks_left
    assert report.finished > 20 and report.aborted
    assert report.preemptions > 0 and report.short_of_planes > 0
    hits = report.hits
    assert hits == sorted(hits, reverse=True) and hits[0] > hits[-1] > 0
