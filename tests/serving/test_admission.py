"""Knobs of a request in the engine core: parsed once, carried with it, and never fatal."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.serving.fake_executor import answer
from tests.serving.fakes import Engine
from vllm_loopus.serving.core import admission
from vllm_loopus.serving.knobs.request import RequestKnobs


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was parsed from now on."""
    seen: list[Any] = []

    class Counted(RequestKnobs):
        @classmethod
        def of(cls, extra_args: Any, defaults: Any) -> RequestKnobs:
            seen.append(extra_args)
            return RequestKnobs.of(extra_args, defaults)

    monkeypatch.setattr(admission, "RequestKnobs", Counted)
    return seen


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("kv_policy", ["exact", "last_exited"])
def test_knobs_are_parsed_once(parsed: list[Any], runner: str, kv_policy: str) -> None:
    """Whatever happens to the request: waiting, running, preempted, scheduled again."""
    engine = Engine(
        num_blocks=4 * 10 + 1,
        max_num_seqs=3,
        quorum=0.3,
        runner_kind=runner,
        kv_policy=kv_policy,
    )
    depths = [1 + index % 4 for index in range(25)]
    requests = [engine.add(f"r{i}", [i, 3, 3], 25, exit_depths=depths) for i in range(6)]
    assert len(parsed) == 6
    engine.run()
    assert len(parsed) == 6
    assert sum(request.num_preemptions for request in requests) > 0
    assert all(engine.depths[f"r{i}"] == depths for i in range(6))


BAD: list[dict[str, Any]] = [
    {"max_loops": 99},
    {"min_loops": 0},
    {"exit_threshold": "high"},
    {"exit_depths": [1, 2, 77]},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("kv_policy", ["exact", "last_exited"])
def test_an_unchecked_request_fails_alone(bad: dict[str, Any], kv_policy: str) -> None:
    """One that reached the engine core past the front end, before and beside others."""
    engine = Engine(kv_policy=kv_policy, max_num_seqs=2)
    engine.add("bad", [7, 8, 9], 5, **bad)
    for index in range(3):
        engine.add(f"r{index}", [index, 1, 2], 5)
    engine.add("late", [7, 8], 5, **bad)
    engine.run()
    for name in ("bad", "late"):
        assert engine.reasons[name] == "error" and engine.outputs[name] == []
        (field,) = bad
        assert field in engine.stop_reasons[name]
    for index in range(3):
        assert engine.reasons[f"r{index}"] == "length"
        if kv_policy == "exact":
            tokens = answer([index, 1, 2], 5, engine.max_loops, engine.max_loops)[0]
            assert engine.outputs[f"r{index}"] == tokens
    assert engine.free_blocks == engine.num_blocks - 1
    assert not engine.scheduler.requests and not engine.scheduler._refused


def test_an_unchecked_request_that_is_aborted_leaves_nothing() -> None:
    from vllm.v1.request import RequestStatus

    engine = Engine()
    engine.add("bad", [7, 8, 9], 5, max_loops=99)
    engine.scheduler.finish_requests("bad", RequestStatus.FINISHED_ABORTED)
    engine.add("good", [1, 2], 3)
    engine.run()
    assert engine.reasons == {"good": "length"}
    assert not engine.scheduler._refused


@pytest.mark.parametrize(("kv_planes", "at_once"), [("all", 2), ("last:2", 4), ("last:1", 8)])
def test_admission_knows_how_many_planes_there_are(kv_planes: str, at_once: int) -> None:
    """Four loops; a request of 12 tokens takes three blocks of four a plane. Before one has
    finished, all planes of its budget are expected."""
    engine = Engine(
        num_blocks=2 * 4 * 3 + 1,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        kv_planes=kv_planes,
        prefix_caching=False,
    )
    for index in range(12):
        engine.add(f"r{index}", [*range(index, index + 11)], 1, exit_threshold=1.0)
    assert len(engine.step().num_scheduled_tokens) == at_once
    engine.run()
    assert engine.scheduler.sequences_that_fit()["full"] == pytest.approx(24 / (10 * engine.planes))


@pytest.mark.parametrize("own", [None, "theirs"])
def test_the_next_input_of_a_session_has_the_salt_of_its_own_seed(own: str | None) -> None:
    """The seed of a first state, as of models whose state is noise."""
    request = SimpleNamespace(cache_salt=own, block_hashes=[], request_id="a")
    request.update_block_hashes = lambda: None
    found = []
    for seed in (5, None, 6, 5):
        setattr(request, admission.ATTRIBUTE, RequestKnobs(4, 1, 0.5, seed=seed))
        admission.salt(request, last_exited=False)
        found.append(request.cache_salt)
    assert found[1] == own
    assert found[0] == found[3] and len({*found}) == 3
    stranger = SimpleNamespace(cache_salt=found[0], block_hashes=[], request_id="b")
    stranger.update_block_hashes = lambda: None
    setattr(stranger, admission.ATTRIBUTE, RequestKnobs(4, 1, 0.5))
    admission.salt(stranger, last_exited=False)
    assert stranger.cache_salt not in found, "a client's salt that looks like ours"
