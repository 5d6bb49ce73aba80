"""What a request may cost, and where the router sends it."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.asynchronous import run as run_async
from vllm_loopus.deploy.budgets import loop_budget


def body(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("request_", "budget"),
    [
        (body(max_tokens=10), 80),
        (body(max_tokens=10, n=2), 160),
        (body(max_completion_tokens=5, max_tokens=None, vllm_xargs={"max_loops": 2}), 10),
        (body(vllm_xargs=None), 8 * 100),
        (body(reasoning_effort="low", max_tokens=10), 20),
        (body(reasoning_effort="low", max_tokens=10, vllm_xargs={"max_loops": 4}), 40),
        (body(max_tokens=4, vllm_xargs={"exit_depths": [1, 3]}), 1 + 3 + 2 * 8),
        (body(max_tokens=1, vllm_xargs={"exit_depths": [1, 3]}), 1),
        (body(max_tokens=4, n=2, vllm_xargs={"exit_depths": [1, 1, 1, 1]}), 2 * 4),
        (body(max_tokens=4, n=3, vllm_xargs={"exit_depths": [1, 3]}), 3 * (1 + 3 + 2 * 8)),
        # Refused by the engine, and no reason for the router to fall over:
        (body(max_tokens=10, vllm_xargs={"max_loops": 999}), 80),
        (body(max_tokens=True, vllm_xargs={"max_loops": "4", "exit_depths": 3}), 800),
        (body(max_tokens=-1, vllm_xargs=[1]), 800),
        (None, 800),
    ],
)
def test_loop_budget(request_: Any, budget: int) -> None:
    assert loop_budget(request_, 8, 100, {"low": 2}) == budget


def pending(name: str, **fields: Any) -> Any:
    return SimpleNamespace(
        args=[body(**fields)],
        metadata=SimpleNamespace(internal_request_id=name),
        routing_context=SimpleNamespace(should_backoff=False),
    )


@pytest.fixture
def queues() -> dict[str, int]:
    return {}


@pytest.fixture
def router(queues: dict[str, int]) -> Any:
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from vllm_loopus.deploy.router import LoopBudgetRouter

    router = LoopBudgetRouter.__new__(LoopBudgetRouter)  # Serve's own state is not needed
    router._replica_queue_len_cache = SimpleNamespace(get=queues.get)
    router.initialize_state(max_loops=8, default_tokens=100)
    return router


def test_router_sends_where_the_least_is_outstanding(router: Any, queues: dict[str, int]) -> None:
    sent: dict[str, str] = {}
    replicas = [SimpleNamespace(replica_id=name) for name in "abc"]

    def send(name: str, **fields: Any) -> str:
        request = pending(name, **fields)
        ranks = run_async(router.choose_replicas(replicas, request))
        assert sorted(r.replica_id for (r,) in ranks) == ["a", "b", "c"]  # a rank each
        assert request.routing_context.should_backoff
        chosen: str = ranks[0][0].replica_id
        router.on_request_routed(request, chosen, None)
        sent[name] = chosen
        return chosen

    deep = send("deep", max_tokens=100)
    shallow = [send(f"s{i}", max_tokens=100, vllm_xargs={"max_loops": 2}) for i in range(6)]
    assert deep not in shallow  # 6 x 200 over the other two are less than 800 on each
    assert {shallow.count(name) for name in set(shallow)} == {3}
    router.on_request_completed(deep, "deep")
    router.on_request_completed(deep, "deep")  # nothing is taken off twice
    assert [send(f"t{i}", max_tokens=100, vllm_xargs={"max_loops": 2}) for i in range(3)] == (
        [deep] * 3
    )
    for name in [f"s{i}" for i in range(6)] + [f"t{i}" for i in range(3)]:
        router.on_request_completed(sent[name], name)
    assert not router._outstanding and not router._sent
    queues.update(a=3, b=0, c=2)  # sent by other processes
    assert send("again", max_tokens=1) == "b"


def test_an_attempt_that_was_refused_leaves_the_next_one_alone(router: Any) -> None:
    """Its end comes with the same name, while another replica has the request."""
    router.on_request_routed(pending("x", max_tokens=10), "b", None)
    router.on_request_completed("a", "x")
    assert router._outstanding == {"b": 80}
    router.on_request_completed("b", "x")
    assert not router._outstanding and not router._sent


def test_an_end_before_the_router_hears_of_the_request(router: Any) -> None:
    from vllm_loopus.deploy.router import MOST_ENDED

    router.on_request_completed("a", "x")
    router.on_request_routed(pending("x", max_tokens=10), "a", None)
    assert not router._outstanding and not router._sent and not router._ended
    for number in range(MOST_ENDED + 9):  # refused, and never routed
        router.on_request_completed("a", f"{number}")
    assert len(router._ended) == MOST_ENDED and ("a", "8") not in router._ended
