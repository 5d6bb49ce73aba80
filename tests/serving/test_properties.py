"""Scheduler, adapter and staircase under random arrivals, depths, preemptions and aborts."""

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from tests.serving.fake_executor import BLOCK, answer
from tests.serving.fakes import Engine

# Prompts that share beginnings, so that prefix hits happen.
PROMPT = st.tuples(st.integers(0, 1), st.integers(1, 22), st.integers(0, 2)).map(
    lambda t: [(t[0] * 7 + i) % 50 for i in range(t[1])] + [40 + i for i in range(t[2])]
)


@st.composite
def requests(draw: Any) -> dict[str, Any]:
    max_loops = draw(st.integers(1, 4))
    return {
        "prompt": draw(PROMPT),
        "max_tokens": draw(st.integers(1, 12)),
        "max_loops": max_loops,
        "min_loops": draw(st.integers(1, max_loops)),
        "priority": draw(st.integers(0, 2)),
        "arrives": draw(st.integers(0, 12)),
        "aborted_after": draw(st.none() | st.integers(0, 20)),
    }


def check_watermarks(engine: Engine, seen: dict[str, tuple[tuple[int, int], np.ndarray]]) -> None:
    """Ordered by depth, never going back while the sequence runs, never beyond its tokens."""
    sequences = engine.runner._sequences
    stairs = sequences.stairs
    for name in sequences._index:
        index = sequences.index(name)
        planes = min(int(stairs.max_depth[index]), stairs.planes) + 1
        done, settled = stairs.done[index, :planes], stairs.settled[index, :planes]
        begun = done[0] + stairs.ahead[index]
        assert (np.diff(done[1:]) <= 0).all() and (done[1:] <= begun).all()
        assert done[0] <= len(sequences.tokens(name))
        assert (stairs.decoded[index, 1:planes] <= done[1:]).all()
        assert (settled[1:] <= done[1:]).all()
        row = index, int(stairs.life[index])
        before = seen.get(name)
        if before is not None and before[0] == row:
            assert (done >= before[1]).all()
        seen[name] = row, done.copy()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    items=st.lists(requests(), min_size=1, max_size=8),
    quorum=st.sampled_from([0.05, 0.5, 1.0, "auto"]),
    budget=st.sampled_from([4, 7, 16, 64]),
    spare_blocks=st.sampled_from([0, 3, 200]),
    caching=st.booleans(),
    kv_policy=st.sampled_from(["exact", "exact", "last_exited"]),
    prefill_depth=st.sampled_from(["lazy", "lazy", "full"]),
    policy=st.sampled_from(["fcfs", "priority"]),
    exit_interval=st.sampled_from([1, 1, 2, 3]),
    overlap=st.sampled_from(["off", "on"]),
    late_verdicts=st.sampled_from(["auto", "on", "off"]),
    eager=st.sampled_from([0, 1, 2, 3]),
    speculate=st.sampled_from([(), (), (1, 1), (1, 3), (2, 2), (3, 5)]),
    last=st.sampled_from([4, 4, 1, 2, 3]),
)
def test_everything_finishes_right(
    items: list[dict[str, Any]],
    quorum: float | str,
    budget: int,
    spare_blocks: int,
    caching: bool,
    kv_policy: str,
    prefill_depth: str,
    policy: str,
    exit_interval: int,
    overlap: str,
    late_verdicts: str,
    eager: int,
    speculate: tuple[int, ...],
    last: int,
) -> None:
    max_len, depth = 40, 4
    blocks = -(-max_len // BLOCK) * last + 1 + spare_blocks  # one sequence fits: as at start-up
    engine = Engine(
        max_loops=depth,
        max_model_len=max_len,
        num_blocks=blocks,
        max_num_batched_tokens=budget,
        quorum=quorum,
        prefix_caching=caching,
        kv_policy=kv_policy,
        prefill_depth=prefill_depth,
        policy=policy,
        exit_interval=exit_interval,
        overlap=overlap,
        late_verdicts="auto" if kv_policy == "last_exited" else late_verdicts,
        eager=eager,
        speculate=() if kv_policy == "last_exited" or last < depth else speculate,
        kv_planes="all" if last == depth else f"last:{last}",
    )
    seen: dict[str, tuple[tuple[int, int], np.ndarray]] = {}
    aborted = set()
    while engine.scheduler.has_requests() or any(
        f"r{i}" not in engine.outputs for i in range(len(items))
    ):
        for index, item in enumerate(items):
            name = f"r{index}"
            idle = not engine.scheduler.has_requests()
            if name not in engine.outputs and (item["arrives"] <= engine.steps or idle):
                engine.add(
                    name,
                    item["prompt"],
                    item["max_tokens"],
                    max_loops=item["max_loops"],
                    min_loops=item["min_loops"],
                    priority=item["priority"],
                )
                item["from"] = engine.steps
            after = item["aborted_after"]
            if (
                after is not None
                and engine.steps == item.get("from", -99) + after
                and engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            ):
                aborted.add(name)
        engine.step()
        check_watermarks(engine, seen)
        assert engine.steps < 3000, "it does not finish"
    for index, item in enumerate(items):
        name = f"r{index}"
        tokens, depths = answer(
            item["prompt"],
            item["max_tokens"],
            depth,
            item["max_loops"],
            item["min_loops"],
            exit_interval,
        )
        count = len(engine.outputs[name])
        assert engine.outputs[name] == tokens[:count]
        assert engine.depths[name] == depths[:count]
        assert name in aborted or count == item["max_tokens"]
    assert engine.free_blocks == blocks - 1
    assert not len(engine.runner._sequences)
