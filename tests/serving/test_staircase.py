"""The arrays of `Staircases` against the definition for one sequence (`one_sequence.py`)."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.one_sequence import Chunk, LoopedSequence
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.step.chunks import Chunks, shares
from vllm_loopus.serving.step.staircase import UNKNOWN, Staircases, Start

DEPTH = 4


@st.composite
def knobs(draw: Any) -> RequestKnobs:
    max_loops = draw(st.integers(1, DEPTH))
    return RequestKnobs(
        max_loops,
        draw(st.integers(1, max_loops)),
        draw(st.sampled_from([0.5, 1.0])),
        tuple(draw(st.lists(st.integers(1, max_loops), max_size=3))),
    )


class Both:
    """Sequences in both forms, driven alike."""

    def __init__(
        self, all_knobs: list[RequestKnobs], prompts: list[int], interval: int, **policy: bool
    ) -> None:
        self.stairs = Staircases(DEPTH, **policy)
        self.stairs.reserve(len(all_knobs) + 3)
        self.index = np.arange(len(all_knobs)) + 2  # not the first rows
        self.ones = []
        for index, of_one, prompt in zip(self.index, all_knobs, prompts, strict=True):
            planes = DEPTH if policy["full_prefill"] else of_one.max_loops
            options = {
                "exit_threshold": of_one.exit_threshold,
                "min_loops": of_one.min_loops,
                "max_loops": of_one.max_loops,
            }
            rule = HaltingRule("threshold", 0.5, 1, DEPTH, interval, 0.0)
            known = [rule.predetermined(d, **options) for d in range(1, planes + 1)]
            self.stairs.add(index, Start(of_one, planes, prompt, known))
            self.ones.append(
                LoopedSequence("r", of_one, planes, prompt, predetermined=known, **policy)
            )

    def row(self, chunk: Chunk) -> tuple[int, ...]:
        owner = self.ones.index(chunk.sequence)
        return int(self.index[owner]), chunk.depth, chunk.start, chunk.end, chunk.newest

    @staticmethod
    def rows(chunks: Chunks) -> list[tuple[int, ...]]:
        arrays = chunks.sequence, chunks.depth, chunks.start, chunks.end, chunks.newest
        return list(zip(*(array.tolist() for array in arrays), strict=True))

    def compare(self) -> None:
        """Everything that is known of the sequences is the same."""
        stairs = self.stairs
        for index, one in zip(self.index.tolist(), self.ones, strict=True):
            planes = one.max_depth + 1
            at = np.array([index])
            assert stairs.done[index, :planes].tolist() == one.done
            assert stairs.decoded[index, :planes].tolist() == one.decoded
            assert bool(stairs.in_flight[index]) == one.in_flight
            assert stairs.num_generated[index] == one.num_generated
            if not one.in_flight:
                continue
            assert (stairs.exit_depth[index] or None) == one.exit_depth
            assert stairs.depth[index] == one.depth and stairs.target[index] == one.target
            for name in ("refined", "undecided", "fills", "copies_on_exit", "prefilling"):
                assert bool(getattr(stairs, name)(at)[0]) == getattr(one, name), name
            for depth in range(1, planes):
                known = int(stairs.predetermined_at(at, np.array([depth]))[0])
                assert (None if known == UNKNOWN else bool(known)) == one.predetermined_at(depth)
                others = np.flatnonzero(stairs.may_exit[index]).tolist()
                assert [d for d in others if d != depth] == one.other_exits(depth)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_arrays_and_definition_agree(data: Any) -> None:
    count = data.draw(st.integers(1, 4))
    all_knobs = data.draw(st.lists(knobs(), min_size=count, max_size=count))
    prompts = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    both = Both(
        all_knobs,
        prompts,
        data.draw(st.sampled_from([1, 2])),
        last_exited=data.draw(st.booleans()),
        full_prefill=data.draw(st.booleans()),
    )
    stairs, ones = both.stairs, both.ones
    for _ in range(data.draw(st.integers(1, 25))):
        idle = [i for i, one in enumerate(ones) if not one.in_flight]
        chosen = [i for i in idle if data.draw(st.booleans())]
        if chosen:
            counts, wants = [], []
            for i in chosen:
                left = prompts[i] - ones[i].done[0]
                counts.append(data.draw(st.integers(1, left)) if left > 0 else 1)
                wants.append(counts[-1] >= left)
                ones[i].begin(counts[-1], wants[-1])
            begun = stairs.begin(both.index[chosen], np.array(counts), np.array(wants))
            assert begun.rows == sum(counts) and (begun.depth == 0).all()
            both.compare()
        expected = [chunk for one in ones for chunk in one.next_chunks()]
        chunks = stairs.next_chunks(both.index)
        assert both.rows(chunks) == [both.row(chunk) for chunk in expected]
        assert stairs.catch_up(chunks) == sum(chunk.catch_up for chunk in expected)
        if expected:
            whole = min(chunk.sequence.passes_ahead(chunk) for chunk in expected)
            assert stairs.passes_ahead(chunks, DEPTH) == min(whole, DEPTH)
            room = np.array([data.draw(st.integers(0, len(chunk))) for chunk in expected])
            whole_rows = data.draw(st.booleans())
            room = chunks.sizes if whole_rows else room
            behind = np.zeros(len(room), dtype=bool)  # attends to all of the chunk before
            behind[1:] = (chunks.sequence[1:] == chunks.sequence[:-1]) & (room < chunks.sizes)[:-1]
            cut = chunks.cut(np.where(behind, 0, room))
            stairs.advance(cut)
            kept = {(row[0], row[1], row[2]): row[3] for row in both.rows(cut)}
            for chunk in expected:
                owner = int(both.index[ones.index(chunk.sequence)])
                if (end := kept.get((owner, chunk.depth, chunk.start))) is not None:
                    chunk.end = end
                    chunk.sequence.advance(chunk)
            both.compare()
            asking = cut[cut.newest & stairs.undecided(cut.sequence)]
            exits = np.array([data.draw(st.booleans()) for _ in range(len(asking))], dtype=bool)
            exits |= asking.depth >= stairs.max_loops[asking.sequence]
            stairs.decide(asking.sequence, asking.depth, exits)
            for row, leaves in zip(both.rows(asking), exits.tolist(), strict=True):
                ones[row[0] - 2].decide(row[1], leaves)
            both.compare()
        ready = stairs.ready(both.index)
        assert ready.tolist() == [
            one.refined and one.wants_token and one.exit_depth is not None for one in ones
        ]
        leaving = both.index[ready]
        decoding = [chunk for i in leaving - 2 for chunk in ones[i].chunks_to_decode()]
        decoded = stairs.chunks_to_decode(leaving)
        assert both.rows(decoded) == [both.row(chunk) for chunk in decoding]
        stairs.advance_decoder(decoded)
        for chunk in decoding:
            chunk.sequence.advance_decoder(chunk)
        both.compare()
        done = both.index[stairs.refined(both.index)]
        stairs.finish(done)
        for i in done - 2:
            ones[i].finish()
        both.compare()


@given(wanted=st.lists(st.integers(0, 20), min_size=1, max_size=8), budget=st.integers(0, 60))
def test_shares(wanted: list[int], budget: int) -> None:
    given_rows = shares(np.array(wanted), budget).tolist()
    assert sum(given_rows) == min(sum(wanted), budget)
    equal = budget // len(wanted)
    for want, got in zip(wanted, given_rows, strict=True):
        assert min(want, equal) <= got <= want
    # What is left over goes to the first ones.
    left = [got - min(want, equal) for want, got in zip(wanted, given_rows, strict=True)]
    unsatisfied = [got < want for want, got in zip(wanted, given_rows, strict=True)]
    if any(unsatisfied):
        first = unsatisfied.index(True)
        assert not any(left[first + 1 :])


def test_a_row_is_used_again() -> None:
    stairs = Staircases(DEPTH)
    start = Start(RequestKnobs(2, 1, 0.5), 2, 3, [None, True])
    stairs.add(5, start)
    life = int(stairs.life[5])
    stairs.begin(np.array([5]), 3, True)
    stairs.fail(5, "first")
    stairs.fail(5, "second")
    assert stairs.reasons == {5: "first"} and not stairs.in_flight[5]
    stairs.remove(5)
    stairs.add(5, start)
    assert not stairs.failed[5] and stairs.done[5].tolist() == [0] * (DEPTH + 1)
    assert stairs.life[5] != life and stairs.reasons == {}
