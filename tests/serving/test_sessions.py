"""Sessions (resumable requests): their input comes in parts, and each part is answered."""

from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from tests.serving.fake_executor import answer
from tests.serving.fakes import Engine
from tests.serving.test_scheduler import assert_right


def test_streaming_input_session() -> None:
    """A second turn on the same request: its planes are filled again where they had gaps."""
    engine = Engine()
    first, more = [4, 5, 6], [7, 8]
    engine.add("session", first, 6, resumable=True)
    for _ in range(30):
        engine.step()
    assert_right(engine, "session", first, 6)
    # The last token of a turn is dropped: nothing has attended to it.
    turn = [*first, *engine.outputs["session"][:-1], *more]
    engine.add("session", more, 6, resumable=True)
    for _ in range(30):
        engine.step()
    assert_right(engine, "session", turn, 6)


def test_a_session_goes_on_after_a_stop_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tokens come in one step, and the answer ends with one that is not the last of them.
    The next input is there already."""
    given: list[int] = []
    vllms_own = Scheduler._update_request_with_output

    def watched(self: Any, request: Any, tokens: list[int], **args: Any) -> Any:
        count = len(tokens)
        result = vllms_own(self, request, tokens, **args)
        given.append(count - len(result[0]))
        return result

    monkeypatch.setattr(Scheduler, "_update_request_with_output", watched)
    for last in range(2, 8):
        engine = Engine(speculate=(1, 3))
        first, more = [4, 5, 6, last], [7, 8]
        tokens = answer(first, last, engine.max_loops, engine.max_loops)[0]
        ends = tokens.index(tokens[-1])  # the first time it is said
        engine.add("session", first, 12, resumable=True, stop_token_ids=[tokens[-1]])
        engine.add("session", more, 6, resumable=True)
        for _ in range(60):
            engine.step()
        turn = [*first, *tokens[:ends], *more]
        second = answer(turn, 6, engine.max_loops, engine.max_loops)[0]
        assert engine.outputs["session"] == [*tokens[: ends + 1], *second]
    assert max(given) > 0


def test_a_waiting_session_holds_no_blocks() -> None:
    """A request that needs the whole pool finishes beside a session that waits for input."""
    engine = Engine(num_blocks=41, max_num_batched_tokens=64)
    first = list(range(20))
    engine.add("session", first, 3, min_loops=4, resumable=True)
    while len(engine.outputs["session"]) < 3:
        engine.step()
    assert engine.free_blocks == 40
    prompt = [9, *range(25)]
    request = engine.add("r", prompt, 10, min_loops=4)
    while "r" not in engine.reasons:
        engine.step()
        assert engine.steps < 300, "it does not finish"
    assert request.num_preemptions == 0
    assert_right(engine, "r", prompt, 10, min_loops=4)
    turn = [*first, *engine.outputs["session"][:-1], 7]
    engine.add("session", [7], 3, min_loops=4, resumable=True)
    while len(engine.outputs["session"]) < 3:
        engine.step()
    assert_right(engine, "session", turn, 3, min_loops=4)
