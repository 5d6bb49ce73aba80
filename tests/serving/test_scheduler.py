"""What vLLM's scheduler promises holds for ours, on a fake model. Exit depths vary by token."""

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from tests.serving.fake_executor import BLOCK, POISON, answer
from tests.serving.fakes import Engine
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.step.quorum import quorum_for


def assert_right(engine: Engine, name: str, prompt: list[int], count: int, **knobs: int) -> None:
    tokens, depths = answer(
        prompt, count, engine.max_loops, **{"max_loops": engine.max_loops, **knobs}
    )
    assert engine.outputs[name] == tokens
    assert engine.depths[name] == depths


def test_finishes_by_length_and_frees_everything() -> None:
    engine = Engine(max_num_seqs=3)
    prompts = {f"r{i}": [i, i + 1, i + 2] for i in range(7)}
    for i, (name, prompt) in enumerate(prompts.items()):
        engine.add(name, prompt, 3 + i)
    while engine.scheduler.has_requests():
        engine.step()
        assert len(engine.scheduler.running) <= 3
    for i, (name, prompt) in enumerate(prompts.items()):
        assert_right(engine, name, prompt, 3 + i)
        assert engine.reasons[name] == "length"
    assert engine.free_blocks == engine.num_blocks - 1
    assert not engine.scheduler.requests and not engine.scheduler.running


def test_finishes_by_stop_token() -> None:
    prompt = [5, 6, 7]
    tokens, _ = answer(prompt, 12, 4, 4)
    stop = next(t for i, t in enumerate(tokens) if i >= 3 and t not in tokens[:i])
    engine = Engine()
    engine.add("r", prompt, 12, stop_token_ids=[stop])
    engine.run()
    assert_right(engine, "r", prompt, tokens.index(stop) + 1)
    assert engine.reasons["r"] == "stop"


def test_finishes_at_max_model_len() -> None:
    engine = Engine(max_model_len=12)
    engine.add("r", [1, 2, 3, 4], 100)
    engine.run()
    assert_right(engine, "r", [1, 2, 3, 4], 8)
    assert engine.reasons["r"] == "length"


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 9])
def test_abort(steps: int) -> None:
    """Waiting, in flight at some depth, or between tokens: the neighbours do not notice."""
    engine = Engine(max_num_seqs=2, quorum=0.05)
    for i in range(4):
        engine.add(f"r{i}", [i, 9, 9, 9, 9, 9], 6)
    for _ in range(steps):
        engine.step()
    finished = [n for n in ("r0", "r3") if n in engine.reasons]
    aborted = engine.scheduler.finish_requests(["r0", "r3"], RequestStatus.FINISHED_ABORTED)
    assert len(aborted) == 2 - len(finished)
    engine.run()
    for name in ("r1", "r2"):
        assert_right(engine, name, [int(name[1]), 9, 9, 9, 9, 9], 6)
    assert engine.free_blocks == engine.num_blocks - 1
    assert not len(engine.runner._sequences)


def test_abort_of_unknown_request() -> None:
    engine = Engine()
    assert engine.scheduler.finish_requests("nobody", RequestStatus.FINISHED_ABORTED) == []


@pytest.mark.parametrize("quorum", [0.05, 0.5, 1.0, "auto"])
def test_preemption_gives_the_same_answers(quorum: float | str) -> None:
    engine = Engine(num_blocks=4 * 10 + 1, max_num_seqs=4, quorum=quorum)
    prompts = {f"r{i}": [i, 3, 3] for i in range(4)}
    requests = {name: engine.add(name, prompt, 30) for name, prompt in prompts.items()}
    engine.run()
    assert sum(request.num_preemptions for request in requests.values()) > 0
    for name, prompt in prompts.items():
        assert_right(engine, name, prompt, 30)
    assert engine.free_blocks == engine.num_blocks - 1


def test_deep_planes_preempt() -> None:
    """Sequences that were admitted for being shallow all go to the full depth: at depth 1 nothing
    is allocated meanwhile."""
    engine = Engine(num_blocks=4 * 10 + 1, max_num_seqs=6, max_num_batched_tokens=64)
    for i in range(20):  # what they take is learned
        engine.add(f"warm{i}", [i, 40, 40], 1, exit_depths=[1])
    engine.run()
    prompts = {f"r{i}": [i, *range(2 * BLOCK)] for i in range(6)}
    depths = [1, 1, 4]
    requests = [engine.add(n, p, 3, exit_depths=depths) for n, p in prompts.items()]
    engine.step()
    assert len(engine.scheduler.running) == 6
    assert engine.scheduler.blocks_by_depth() == [18, 0, 0, 0]
    engine.run()
    preempted = [request for request in requests if request.num_preemptions]
    assert preempted and requests[0] not in preempted
    assert engine.scheduler.kv_cache_manager.short_of_planes > 0
    for name, prompt in prompts.items():
        assert engine.outputs[name] == answer(prompt, 3, 4, 4)[0]
        assert engine.depths[name] == depths
    assert engine.free_blocks == engine.num_blocks - 1


def test_admission_leaves_room_for_what_is_expected() -> None:
    """Until something else has been learned, sequences are taken to need all of their budget."""
    for budget, together in ((1, 6), (2, 6), (4, 3)):
        engine = Engine(num_blocks=4 * 10 + 1, max_num_seqs=6, max_num_batched_tokens=64)
        for i in range(6):
            engine.add(f"r{i}", [i, *range(2 * BLOCK)], 1, max_loops=budget, min_loops=budget)
        engine.step()
        assert len(engine.reasons) == together
        engine.run()


def test_shared_blocks_leave_the_need_of_others() -> None:
    """A request that shares more blocks than it is expected to need takes no room from others, and
    makes none for further ones."""
    engine = Engine(num_blocks=100, max_num_batched_tokens=64, max_model_len=100)
    shared = list(range(10 * BLOCK + 1))
    engine.add("deep", shared, 50, min_loops=4)
    engine.step()
    manager = engine.scheduler.kv_cache_manager
    for _ in range(60):  # so the next one is expected to need a plane at most
        manager.demand.observe(4, 1.0, 40)
    manager._needed["deep"] = 4.0
    new = engine.add("x", [*shared, 1], 1)
    hits = manager.get_computed_blocks(new)[0].blocks
    in_use = sum(block.ref_cnt > 0 for blocks in hits for block in blocks)
    assert in_use > manager._expected(new, 4)
    deep = manager._holders["deep"]
    still = manager._expected(deep.request, 4) - deep.held
    assert still > 0
    taken = manager.block_pool.get_new_blocks(engine.free_blocks - still + 1)
    assert not manager._fits(new, hits)
    manager.block_pool.free_blocks(taken[:1])
    assert manager._fits(new, hits)


def test_chunks_stay_in_the_budget() -> None:
    """FakeExecutor fails on more rows than `max_num_batched_tokens`."""
    engine = Engine(max_num_batched_tokens=4, max_num_seqs=4)
    prompt = list(range(19))
    engine.add("long", prompt, 4)
    engine.add("short", [7, 7], 9)
    scheduled = engine.step()
    assert scheduled.num_scheduled_tokens == {"long": 4}
    engine.run()
    assert_right(engine, "long", prompt, 4)
    assert_right(engine, "short", [7, 7], 9)


@pytest.mark.slow
@pytest.mark.parametrize("quorum", [0.01, 0.5, "auto"])
def test_a_chunk_in_flight_leaves_the_budget_to_others(quorum: float | str) -> None:
    """Requests that come after a long prompt wait as long as if its chunks took one pass."""
    waited = {}
    for depth in (1, 4):
        engine = Engine(
            max_model_len=400,
            num_blocks=1000,
            max_num_seqs=8,
            quorum=quorum,
        )
        for i in range(3):  # a step ends when one of them is ready
            engine.add(f"first{i}", [i], 120, max_loops=1)
        engine.step()
        prompt = list(range(100))
        engine.add("long", prompt, 2, min_loops=depth)
        engine.step()
        for i in range(3):
            engine.add(f"late{i}", [7 + i], 3, max_loops=1)
        before = engine.steps
        while not all(engine.outputs[f"late{i}"] for i in range(3)):
            engine.step()
        waited[depth] = engine.steps - before
        assert "first0" not in engine.reasons, "a request was always ready"
        engine.run()
        assert_right(engine, "long", prompt, 2, min_loops=depth)
        for i in range(3):
            assert_right(engine, f"late{i}", [7 + i], 3, max_loops=1)
    assert waited[4] <= waited[1]


def test_priorities() -> None:
    engine = Engine(policy="priority", max_num_seqs=1)
    for name, priority in (("low", 5), ("high", 0), ("middle", 3)):
        engine.add(name, [priority, 1, 2], 4, priority=priority)
    order: list[str] = []
    while engine.scheduler.has_requests():
        engine.step()
        order += [name for name in engine.reasons if name not in order]
    assert order == ["high", "middle", "low"]


def test_preempts_the_lowest_priority() -> None:
    engine = Engine(policy="priority", num_blocks=4 * 10 + 1, max_num_seqs=2)
    low = engine.add("low", [1, 1, 1], 30, priority=9)
    high = engine.add("high", [2, 2, 2], 30, priority=0)
    engine.run()
    assert low.num_preemptions > 0 and high.num_preemptions == 0
    assert_right(engine, "low", [1, 1, 1], 30)
    assert_right(engine, "high", [2, 2, 2], 30)


def test_prefix_statistics() -> None:
    engine = Engine()
    prompt = list(range(2 * BLOCK + 1))
    for name in ("first", "second"):
        engine.add(name, prompt, 3)
        engine.run()
        assert_right(engine, name, prompt, 3)
    stats = [s.prefix_cache_stats for s in engine.stats if s.prefix_cache_stats.requests]
    assert [s.queries for s in stats] == [len(prompt), len(prompt)]
    assert [s.hits for s in stats] == [0, 2 * BLOCK]


def test_a_prompt_in_flight_is_found_as_deep_as_it_is() -> None:
    """A second request with the same prompt arrives while the first is at some middle depth."""
    engine = Engine(quorum=0.05, max_num_batched_tokens=32)
    # Leaves at depth 1 again and again, so that steps are one pass long.
    engine.add("quick", [1], 12, max_loops=1)
    engine.step()
    prompt = list(range(2 * BLOCK + 1))
    engine.add("first", prompt, 2, min_loops=4)
    engine.step()
    stairs, index = engine.row("first")
    assert stairs.in_flight[index] and stairs.done[index].tolist() == [2 * BLOCK + 1] * 2 + [0] * 3
    engine.add("second", prompt, 2)
    scheduled = engine.step()
    assert scheduled.num_scheduled_tokens["second"] == 1
    blocks = engine.scheduler.kv_cache_manager.get_block_ids
    assert blocks("second")[0][:2] == blocks("first")[0][:2]
    assert not set(blocks("second")[1]) & set(blocks("first")[1])
    engine.run()
    for name, knobs in (("first", {"min_loops": 4}), ("second", {})):
        assert_right(engine, name, prompt, 2, **knobs)
    assert_right(engine, "quick", [1], 12, max_loops=1)


def test_a_partial_hit_is_completed_for_others() -> None:
    """Leaving early publishes little; who goes deeper finds that, and adds what was missing."""
    engine = Engine()
    prompt = list(range(3 * BLOCK + 1))
    found = []
    for name, depth in (("a", 1), ("b", 3), ("c", 2), ("d", 4), ("e", 4)):
        engine.add(name, prompt, 1, max_loops=depth, min_loops=depth)
        engine.step()
        found.append([positions // BLOCK for positions in engine.found[name]])
        engine.run()
        assert_right(engine, name, prompt, 1, max_loops=depth, min_loops=depth)
    assert found == [[0] * 4, [3, 0, 0, 0], [3, 3, 0, 0], [3, 3, 3, 0], [3, 3, 3, 3]]
    assert engine.free_blocks == engine.num_blocks - 1


@pytest.mark.parametrize("caching", [True, False])
def test_deep_planes_go_first(caching: bool) -> None:
    """Of a prefix that nobody uses, memory is taken from its deepest plane first."""
    engine = Engine(num_blocks=4 * 10 + 1, prefix_caching=caching)
    prompt = list(range(4 * BLOCK + 1))
    engine.add("deep", prompt, 1, min_loops=4)
    engine.run()
    # 30 of 40 blocks, of which 24 held nothing: 16 published ones of "deep" are there until then.
    engine.add("other", [49] * (10 * BLOCK - 1), 1, max_loops=3, min_loops=3)
    engine.run()
    assert engine.free_blocks == engine.num_blocks - 1
    engine.add("again", prompt, 1, min_loops=4)
    engine.run()
    found = [positions // BLOCK for positions in engine.found["again"]]
    assert found == ([4, 4, 2, 0] if caching else [0] * 4)
    assert_right(engine, "again", prompt, 1, min_loops=4)


def test_answers_are_published_as_deep_as_they_are() -> None:
    """Generated positions can be hit when a later token has taken them to the full depth."""
    engine = Engine()
    engine.add("first", [3, 4], 3 * BLOCK, min_loops=4)
    engine.run()
    assert_right(engine, "first", [3, 4], 3 * BLOCK, min_loops=4)
    prompt = [3, 4, *engine.outputs["first"]]
    engine.add("second", prompt, 2)
    engine.run()
    assert_right(engine, "second", prompt, 2)
    hits = sum(s.prefix_cache_stats.hits for s in engine.stats)
    assert hits == 3 * BLOCK


def test_reset_of_the_prefix_cache_with_requests_in_flight() -> None:
    engine = Engine(quorum=0.05)
    for i in range(3):
        engine.add(f"r{i}", [i, 8, 8, 8, 8], 8)
    for _ in range(3):
        engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    for i in range(3):
        assert_right(engine, f"r{i}", [i, 8, 8, 8, 8], 8)


def test_drain() -> None:
    """Paused for new requests: those that run finish, those that wait stay; then all go on."""
    engine = Engine(max_num_seqs=2)
    for i in range(4):
        engine.add(f"r{i}", [i, 2], 5)
    engine.step()
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(100):
        engine.step()
    assert set(engine.reasons) == {"r0", "r1"}
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    for i in range(4):
        assert_right(engine, f"r{i}", [i, 2], 5)
    assert engine.scheduler.get_num_unfinished_requests() == 0


@pytest.mark.parametrize("kv_policy", ["exact", "last_exited"])
@pytest.mark.parametrize("position", [0, 6, 21])
def test_a_poisoned_request_fails_alone(kv_policy: str, position: int) -> None:
    """In its first chunk, with company, or late; its blocks come back, and none is found again."""
    engine = Engine(kv_policy=kv_policy, max_num_batched_tokens=8, quorum=0.3)
    poisoned = [p % 50 for p in range(22)]
    poisoned[position] = POISON
    for i in range(3):
        engine.add(f"r{i}", [i, 2, 3, 4, 5], 8)
    engine.add("bad", poisoned, 8)
    engine.add("again", poisoned, 8)
    engine.run()
    assert engine.reasons["bad"] == engine.reasons["again"] == "error"
    assert engine.outputs["bad"] == engine.outputs["again"] == []
    assert engine.found["again"][0] <= position // BLOCK * BLOCK
    for i in range(3):
        assert engine.reasons[f"r{i}"] == "length"
        if kv_policy == "exact":
            assert_right(engine, f"r{i}", [i, 2, 3, 4, 5], 8)
    assert engine.free_blocks == engine.num_blocks - 1


def test_pause_in_flight() -> None:
    engine = Engine(quorum=0.05, max_num_seqs=3)
    for i in range(3):
        engine.add(f"r{i}", [i, 2], 5)
    engine.step()
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    before = dict(engine.outputs)
    for _ in range(5):
        assert engine.step().total_num_scheduled_tokens == 0
    assert engine.outputs == before
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    for i in range(3):
        assert_right(engine, f"r{i}", [i, 2], 5)


def test_statistics_that_nobody_takes_are_not_kept() -> None:
    engine = Engine()
    engine.scheduler.log_stats = False
    engine.add("r", [1, 2], 10)
    engine.run()
    assert engine.scheduler._stats == LoopStats()


@pytest.mark.parametrize("quorum", [0.01, 0.5, 1.0, "auto"])
@pytest.mark.parametrize("budget", [4, 8, 64])
def test_nobody_starves(quorum: float | str, budget: int) -> None:
    """A token waits a bounded number of steps, whatever the others do.

    The longest in flight is served first. Each of `n` sequences may have to be caught up by as many
    rows as it has positions, at each depth, through the row budget that new rows leave over.
    """
    seqs, length, depth = 4, 30, 4
    engine = Engine(
        max_loops=depth,
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        quorum=quorum,
        num_blocks=400,
    )
    for i in range(12):
        engine.add(f"r{i}", [i, i], 25)
    rows = seqs * length * (depth + 1)  # reasoning at each depth, and the decoder
    bound = depth + rows // max(1, budget - seqs + 1) + 1
    longest = 0
    while engine.scheduler.has_requests():
        engine.step()
        stairs = engine.runner._sequences.stairs
        longest = max([longest, *stairs.age[stairs.present]])
        assert longest <= bound
    for i in range(12):
        assert_right(engine, f"r{i}", [i, i], 25)


@pytest.mark.parametrize("kv_policy", ["exact", "last_exited"])
def test_a_long_catch_up_keeps_nobody_waiting(kv_policy: str) -> None:
    """A prompt left at depth 1; the token after it goes to depth 4 and takes the prompt along."""
    engine = Engine(max_num_batched_tokens=8, quorum=0.01, max_num_seqs=4, kv_policy=kv_policy)
    engine.add("long", list(range(30)), 2, exit_depths=[1, 4])
    while not engine.outputs["long"]:
        engine.step()
    quick = [f"q{i}" for i in range(3)]
    for i, name in enumerate(quick):
        engine.add(name, [i], 38, max_loops=1)
    engine.step()
    rows = []
    while len(engine.outputs["long"]) < 2:
        before = {name: len(engine.outputs[name]) for name in quick}
        stairs, index = engine.row("long")
        done = stairs.done[index].tolist()
        engine.step()
        assert all(len(engine.outputs[name]) == before[name] + 1 for name in quick)
        if "long" in engine.runner._sequences:
            now = stairs.done[index].tolist()
            rows.append(sum(now[2:]) - sum(done[2:]))
    assert len(rows) > 3 and max(rows[:-1]) >= 5  # it gets what the others leave
    engine.run()
    assert engine.depths["long"] == [1, 4]


def test_a_sequence_that_leaves_makes_room_in_the_next_step() -> None:
    engine = Engine(max_num_seqs=2, quorum=0.05)
    engine.add("deep", [1, 2, 3], 5, min_loops=4)
    engine.add("short", [4], 1, max_loops=1)
    engine.add("waiting", [6], 3)
    while "short" not in engine.reasons:
        assert "waiting" not in engine.step().num_scheduled_tokens
    assert "waiting" in engine.step().num_scheduled_tokens
    engine.run()
    assert_right(engine, "deep", [1, 2, 3], 5, min_loops=4)
    assert_right(engine, "waiting", [6], 3)


@pytest.mark.parametrize(("rule", "together"), [("auto", True), (0.01, False)])
def test_known_budgets_meet_at_the_boundary(rule: float | str, together: bool) -> None:
    """Two cohorts one pass out of step: `auto` waits once, and then they leave together."""
    engine = Engine(quorum=0.01, max_num_seqs=9, num_blocks=800)
    engine.add("quick", [1], 3, max_loops=1)  # leaves after each pass, so that steps are short
    engine.step()
    cohorts = [[f"a{i}" for i in range(4)], [f"b{i}" for i in range(4)]]
    for cohort in cohorts:
        for name in cohort:
            engine.add(name, [ord(name[0]) % 50, int(name[1])], 12, min_loops=4)
        engine.step()
    for name, depth in (("a0", 2), ("b0", 1)):
        stairs, index = engine.row(name)
        assert stairs.depth[index] == depth
    assert "quick" in engine.reasons
    engine.runner._sequences.runner.quorum = quorum_for(rule, 4)
    before = engine.steps
    engine.run()
    assert (engine.steps - before <= 14) == together
    for name in [*cohorts[0], *cohorts[1]]:
        assert_right(engine, name, [ord(name[0]) % 50, int(name[1])], 12, min_loops=4)
