"""Whatever the body of a request: no server error, and the engine is alive at the end."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI

from tests.serving.conftest import SERVED, get
from tests.serving.test_http import ENDPOINTS
from vllm_loopus.serving.knobs.names import REQUEST_KNOBS

NUMBERS = st.one_of(
    st.integers(-2, 10), st.integers(), st.floats(), st.sampled_from([2**63, -(2**64), 10**400])
)
SCALARS = st.one_of(NUMBERS, st.booleans(), st.none(), st.text(max_size=8))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from([*REQUEST_KNOBS, "max_loop", "loops", "session_id"]) | st.text(max_size=10)
KNOBS = st.dictionaries(NAMES, SCALARS | st.lists(NUMBERS, max_size=20), max_size=4)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "vllm_xargs": KNOBS | ANYTHING,
        "max_loops": ANYTHING,
        "exit_threshold": ANYTHING,
        "reasoning_effort": st.sampled_from(["low", "high", "max", "most"]) | ANYTHING,
        "reasoning": st.fixed_dictionaries({"effort": st.sampled_from(["low", "x"]) | ANYTHING}),
        "stream": st.booleans() | ANYTHING,
        "n": st.integers(0, 3) | ANYTHING,
        "max_tokens": st.integers(-1, 12) | ANYTHING,
        "temperature": st.floats(0, 2) | ANYTHING,
        "stop": st.text(max_size=3) | ANYTHING,
        "prompt": st.text(max_size=8) | ANYTHING,
        "messages": ANYTHING,
        "input": ANYTHING,
    },
)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_no_server_error(address: str, client: OpenAI, endpoint: str) -> None:
    accepted = 0
    with httpx.Client(base_url=f"{address}/v1/", timeout=60) as http:

        @settings(
            max_examples=250,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(fields=FIELDS, extra=st.dictionaries(NAMES, ANYTHING, max_size=2))
        def fuzz(fields: dict[str, Any], extra: dict[str, Any]) -> None:
            nonlocal accepted
            body = json.dumps({**ENDPOINTS[endpoint], **extra, **fields})
            answer = http.post(endpoint, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code < 500, (body, answer.text)
            accepted += answer.status_code == 200
            assert '"InternalServerError"' not in answer.text, (body, answer.text)

        fuzz()
    assert accepted > 5  # not everything was refused
    get(address, "/health")
    answer = client.completions.create(model=SERVED, prompt="(3+4)=", max_tokens=3)
    assert answer.usage.completion_tokens
