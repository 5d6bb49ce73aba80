"""NaN or infinite states: the request fails, its neighbours do not notice."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import GenerationError

from tests.conftest import GOLDEN, counter, golden_cases, kv_manager, runner_of, spy_on_steps
from vllm_loopus import exit_depths
from vllm_loopus.serving.frontend.answers import explain_failure
from vllm_loopus.serving.frontend.http import LoopedHandler
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.step.staircase import Staircases, Start
from vllm_loopus.serving.worker.block_tables import BlockTables
from vllm_loopus.serving.worker.nonfinite import WatchedRows
from vllm_loopus.serving.worker.verdicts import Verdicts

POISON = 511  # a token id that the golden prompts and answers do not hold
FAILED = "vllm:loopus_nonfinite_requests"


def caches(llm: Any) -> list[torch.Tensor]:
    result: list[torch.Tensor] = runner_of(llm).model.planes.floats()
    return result


@contextmanager
def embedded(llm: Any, value: float) -> Iterator[None]:
    """The poison's embedding is `value`: states are poisoned from the encoder on."""
    weight = runner_of(llm).model.encoder.embed_tokens.weight.data
    row = weight[POISON].clone()
    weight[POISON] = value
    yield
    weight[POISON] = row


@contextmanager
def at_position(llm: Any, name: str, position: int) -> Iterator[None]:
    """What `refine` or `decode` is given for `position` is NaN."""
    model = runner_of(llm).model
    original = getattr(model, name)

    def poisoned(state: torch.Tensor, positions: torch.Tensor, *rest: Any) -> Any:
        bad = (positions == position)[:, None]
        return original(torch.where(bad, torch.nan, state), positions, *rest)

    setattr(model, name, poisoned)
    yield
    delattr(model, name)


def sampling(case: dict[str, Any], **more: Any) -> Any:
    from vllm import SamplingParams

    knobs = {"max_loops": case["N"], "exit_threshold": case["q_threshold"]}
    defaults = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
    return SamplingParams(**{**defaults, "extra_args": knobs, **more})


def generate(llm: Any, prompts: list[list[int]], params: list[Any]) -> list[Any]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def neighbours(kv_policy: str) -> list[dict[str, Any]]:
    cases = [c for c in golden_cases("qwen3") if c["halting_strategy"] == "threshold"]
    cases = [c for c in cases if c["q_eval_interval"] == 1 and len(c["prompt"]) < 20]
    if kv_policy == "last_exited":  # where it takes nothing over, it is the golden answer
        cases = [c for c in cases if len(set(c["depths"])) == 1]
    return cases[:6]


@pytest.fixture(scope="module", params=["exact", "last_exited"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llm(make_llm: Any, policy: str) -> Any:
    return make_llm(
        GOLDEN / "qwen3",
        skip_tokenizer_init=True,
        disable_log_stats=False,
        max_num_batched_tokens=64,
        max_num_seqs=16,
        additional_config={"loopus": {"kv_policy": policy}},
    )


PLACES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "encoder, NaN": (lambda llm: embedded(llm, torch.nan), "at depth 1"),
    "encoder, infinite": (lambda llm: embedded(llm, torch.inf), "at depth 1"),
    # Position 45 is generated: its sequence has blocks at every depth by then.
    "pass": (lambda llm: at_position(llm, "refine", 45), r"at depth \d"),
    "boundary": (lambda llm: at_position(llm, "decode", 45), r"in the decoder at depth \d"),
}


@pytest.mark.parametrize("place", PLACES)
def test_neighbours_go_on(llm: Any, policy: str, place: str) -> None:
    poisoned, where = PLACES[place]
    cases = neighbours(policy)
    assert not any(POISON in [*c["prompt"], *c["tokens"]] for c in cases)
    # As long as a block and more; the poison comes after the first block.
    victim = [7, *range(100, 139), POISON, 9]
    deep = sampling({"N": 8, "q_threshold": 2.0}, max_tokens=10)
    before, free = counter(llm, FAILED), kv_manager(llm).block_pool.get_num_free_blocks()
    kv_manager(llm).reset_prefix_cache()
    with poisoned(llm):
        prompts = [case["prompt"] for case in cases]
        failed, *others = generate(
            llm, [victim, *prompts], [deep, *(sampling(case) for case in cases)]
        )
    assert failed.finish_reason == "error"
    assert re.fullmatch("NaN or infinite hidden states " + where, failed.stop_reason)
    for case, output in zip(cases, others, strict=True):
        assert list(output.token_ids) == case["tokens"]
        assert exit_depths(output) == case["depths"]
    assert counter(llm, FAILED) == before + 1
    # Nothing of it is left: no block, no NaN for whoever gets its blocks, no wrong prefix.
    assert kv_manager(llm).block_pool.get_num_free_blocks() == free
    assert all(torch.isfinite(cache).all() for cache in caches(llm))
    again = generate(llm, [victim], [deep])[0]
    kv_manager(llm).reset_prefix_cache()
    fresh = generate(llm, [victim], [deep])[0]
    assert again.token_ids == fresh.token_ids and again.finish_reason == "length"


def test_a_state_that_goes_bad_in_passes_that_run_as_one_call(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the last of them is looked at: what is no number stays so."""
    model = runner_of(llm).model
    original, calls = model.refine, 0

    def poisoned_once(state: torch.Tensor, positions: torch.Tensor, *rest: Any) -> Any:
        nonlocal calls
        bad = (positions == 45)[:, None]
        calls += bool(bad.any())
        return original(torch.where(bad & (calls == 1), torch.nan, state), positions, *rest)

    monkeypatch.setattr(model, "refine", poisoned_once)
    deep = sampling({"N": 8, "q_threshold": 2.0}, max_tokens=10)
    failed = generate(llm, [[*range(100, 141)]], [deep])[0]
    assert calls == 8
    assert failed.finish_reason == "error"
    assert failed.stop_reason == "NaN or infinite hidden states at depth 8"
    assert all(torch.isfinite(cache).all() for cache in caches(llm))


def test_the_same_prompt_fails_whole_and_in_chunks(llm: Any) -> None:
    """A prompt that is poisoned in a chunk that wants no token yet; and twice at once."""
    deep = sampling({"N": 8, "q_threshold": 2.0}, max_tokens=4)
    victim = [*range(100, 164), POISON, *range(200, 240)]  # chunks of at most 64
    with embedded(llm, torch.nan):
        steps = spy_on_steps(llm)
        outputs = generate(llm, [victim, victim], [deep, deep])
    assert [output.finish_reason for output in outputs] == ["error", "error"]
    assert sum(step.nonfinite_requests for step in steps) == 2
    assert all(torch.isfinite(cache).all() for cache in caches(llm))
    assert generate(llm, [victim], [deep])[0].finish_reason == "length"


def test_the_server_says_why() -> None:
    failure = "NaN or infinite hidden states at depth 3"
    completion = SimpleNamespace(finish_reason="error", stop_reason=failure)
    explain_failure(completion)
    assert completion.finish_reason == "error"
    handler: Any = object.__new__(LoopedHandler)
    with pytest.raises(GenerationError, match=failure):
        handler._raise_if_error(completion.finish_reason, "request")


class FirstRank:
    """A group in which the first rank has said `said`."""

    def __init__(self, said: list[int]) -> None:
        self.said = torch.tensor(said, dtype=torch.uint8)

    def broadcast(self, mine: torch.Tensor, src: int) -> torch.Tensor:
        assert src == 0 and mine.shape == self.said.shape and mine.dtype == torch.uint8
        return self.said


def test_blocks_of_unread_calls_are_suspect_until_these_are_read() -> None:
    tables = BlockTables(num_depths=1, max_blocks=2, num_blocks=6, block_size=4)
    tables.add(0, [[1, 2]], cached=0)
    tables.suspect(0, call=3)
    tables.add(1, [[4]], cached=0)
    assert not tables.suspects_in_use
    tables.add(0, [[2]], cached=0)
    for oldest in (1, 3):  # calls are read in order; a step begins in between
        tables.trust(oldest)
        assert tables.suspects_in_use
    tables.trust(4)
    assert not tables.suspects_in_use
    tables.append(1, [1])
    assert not tables.suspects_in_use, "that call has been read"


def test_the_first_rank_decides() -> None:
    """Whatever another rank computed: it is not asked."""
    knobs = RequestKnobs(4, 1, 0.5)
    stairs = Staircases(4)
    for index in range(3):
        stairs.add(index, Start(knobs, 4, 3, [None] * 4))
    index = np.arange(3)
    stairs.begin(index, 3, True)
    sums = np.array(
        [[1, 2, 3, np.nan, 0, np.inf, 1, np.inf, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=np.float32
    )
    group: Any = FirstRank([*sums.view(np.uint8).ravel(), 0, 1, 1])
    cleansed: list[Any] = []
    verdicts = Verdicts(group, stairs, cleansed.append)
    states = torch.zeros(9, 4)
    states[0] = torch.nan
    tables = BlockTables(num_depths=4, max_blocks=1, num_blocks=4, block_size=4)
    for row in range(3):
        tables.add(row, [[row + 1], [], [], []], cached=0)
    first, second = tables.layouts(stairs.next_chunks(index).at(2), 2)
    verdicts.watch(WatchedRows.of(stairs, [first], states))
    verdicts.watch(WatchedRows.of(stairs, [first, second], states))
    verdict = verdicts.queue(torch.tensor([True, False, False]))
    stairs.remove(2)  # meanwhile
    assert verdict.wait().tolist() == [False, True, True]
    assert stairs.reasons == {1: "NaN or infinite hidden states at depth 1"}
    assert stairs.in_flight[:2].tolist() == [True, False]
    assert [blocks.tolist() for blocks in cleansed] == [[3]], "who gets its block is safe"
