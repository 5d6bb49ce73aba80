"""How far each position of each running sequence has been computed: watermarks by depth.

`done[s, r]` positions of sequence s, from 0 on, have K/V and state at depth r, or a pass that
writes them has been launched; `done[s, 0]` have been begun. A token that goes to depth r takes
along the positions from `done[s, r]` on that come before it (policy `exact`), so
`done[s, 0] >= done[s, 1] >= ...`: a staircase. The decoder has separate watermarks,
`decoded[s, r] <= done[s, r]`, which are not ordered by depth. `settled[s, r] <= done[s, r]`
positions are known to be finite: their passes are over.

All running sequences are rows of the same arrays, so a pass takes the same few array operations
for any number of sequences. `tests/serving/one_sequence.py` has the definition for one sequence;
`tests/serving/test_staircase.py` checks the arrays against it.

The newest positions of a sequence are *in flight* from `begin` to `finish`.

- A token, including the last one of the prompt, runs until it exits and takes along the positions
  that are not computed at its depths. A prompt chunk that is not the last runs to the least depth a
  token may exit at, which the prompt needs in any case.
- With `full_prefill`, a prompt runs to the last plane at least, so that others find it in the
  prefix cache. The exit depth of its last position is noted on the way.

With guesses (`wave.py`), `ahead[s]` positions after the newest certain one are in flight as well,
each with a depth of its own: `depths[s, j]` is that of the position `done[s, 0] - 1 + j`, its slot
j. The arrays of the newest certain position, slot 0, have the names without an s. Watermarks from
depth 1 on count guessed positions, `done[s, 0]` does not.

With `planes` below the number of depths, K/V exists up to depth `planes`. A position that goes
deeper reads that of the last plane and takes nothing along; the decoder goes over it at the last
plane first, for its K/V. A prompt that is scored goes deeper as a whole, for its states.

In `last_exited`, a generated position has K/V at all depths once its token has exited, and decoder
K/V at all depths a token may exit at. Prompt positions only have it up to the watermarks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints
from vllm_loopus.serving.step.given import with_row

UNKNOWN = 2  # of `_predetermined`: the exit rule computes it


@dataclass(frozen=True)
class Start:
    """Where a sequence starts.

    - `max_depth`: planes that it may need. `prefill_end`: tokens known now.
    - `cached[r - 1]`: positions found at depth r in the prefix cache. `decoded[r - 1]`: how many of
      them have decoder K/V at depth r; None for none. Both end with the last plane.
    - `num_generated`: tokens generated so far.
    - `predetermined[r - 1]`: whether a token exits at depth r, None if the exit rule computes that
      (`ExitRule.predetermined`).
    - `scored`: the decoder has to compute all positions of the prompt, because they are scored.
    """

    knobs: RequestKnobs
    max_depth: int
    prefill_end: int
    predetermined: Sequence[bool | None]
    cached: Sequence[int] | None = None
    decoded: Sequence[int] | None = None
    num_generated: int = 0
    scored: bool = False


# What is known of a sequence, by name of the array: shape after [S], type.
_ARRAYS = {
    "present": ((), bool),
    "in_flight": ((), bool),
    "wants_token": ((), bool),  # of the positions in flight
    "stalled": ((), bool),  # in the last pass, for lack of blocks
    "failed": ((), bool),  # nothing more can be computed
    "scored": ((), bool),
    "max_depth": ((), np.int64),
    "max_loops": ((), np.int64),
    "min_loops": ((), np.int64),
    "prefill_end": ((), np.int64),
    "num_generated": ((), np.int64),
    "begun": ((), np.int64),  # the first position in flight
    "ahead": ((), np.int64),  # guessed positions in flight
    "tentative": ((), bool),  # its newest position began with a guess that is not confirmed yet
    "greedy": ((), bool),  # its tokens are the most likely ones, whatever came before
    "spoiled": ((), bool),  # guesses were forgotten because of their states
    "lookahead": ((), np.int64),  # how many there may be
    "begins": ((), np.int64),  # how often positions have begun, guessed ones included
    "age": ((), np.int64),  # steps in flight
    "life": ((), np.int64),  # how many sequences have had this row
}
BY_SLOT = {
    "depths": np.int64,  # that a position in flight has reached
    "targets": np.int64,  # that it goes to, as far as is known
    "exit_depths": np.int64,  # 0: not known yet
    "given_depths": np.int64,  # the exit depth given for its token; 0: none
    "numbers": np.int64,  # its beginning, among those of the sequence, from 1
    "guesses": np.int64,  # the token it begins with, if that is a guess
    "guess_depths": np.int64,  # and the depth at which it was guessed
}
_BY_DEPTH = {
    "done": np.int64,
    "settled": np.int64,
    "decoded": np.int64,
    "may_exit": bool,  # whether a token may exit at this depth
    "_predetermined": np.int8,
}


@dataclass(eq=False)
class Staircases:
    """The staircases of all running sequences: arrays over S rows, one for each; see the module.

    `last_exited`: the K/V policy. `full_prefill`: see the module. `slots`: positions in flight of a
    sequence, one more than may be guessed. `decoder_attends`: whether the decoder has K/V; without,
    it computes the newest positions alone. `decodes_in_passes`: passes fill it too. `planes`:
    depths with K/V of their own, all by default.
    """

    num_depths: int
    last_exited: bool = False
    full_prefill: bool = False
    slots: int = 1
    decoder_attends: bool = True
    decodes_in_passes: bool = False
    planes: int = 0
    reasons: dict[int, str] = field(default_factory=dict)  # why a sequence failed

    present: Bools = field(init=False)
    in_flight: Bools = field(init=False)
    wants_token: Bools = field(init=False)
    stalled: Bools = field(init=False)
    failed: Bools = field(init=False)
    scored: Bools = field(init=False)
    max_depth: Ints = field(init=False)
    max_loops: Ints = field(init=False)
    min_loops: Ints = field(init=False)
    prefill_end: Ints = field(init=False)
    num_generated: Ints = field(init=False)
    begun: Ints = field(init=False)
    depth: Ints = field(init=False)
    target: Ints = field(init=False)
    exit_depth: Ints = field(init=False)
    forced: Ints = field(init=False)
    ahead: Ints = field(init=False)
    tentative: Bools = field(init=False)
    greedy: Bools = field(init=False)
    spoiled: Bools = field(init=False)
    lookahead: Ints = field(init=False)
    begins: Ints = field(init=False)
    depths: Ints = field(init=False)  # [S, slots]
    targets: Ints = field(init=False)
    exit_depths: Ints = field(init=False)
    given_depths: Ints = field(init=False)
    numbers: Ints = field(init=False)
    guesses: Ints = field(init=False)
    guess_depths: Ints = field(init=False)
    age: Ints = field(init=False)
    life: Ints = field(init=False)
    done: Ints = field(init=False)  # [S, N + 1]
    settled: Ints = field(init=False)
    decoded: Ints = field(init=False)
    may_exit: Bools = field(init=False)
    _predetermined: NDArray[np.int8] = field(init=False)
    _given: Ints = field(init=False)  # [S, G]: exit depths given for the first tokens; 0: none
    _right: Ints = field(init=False)  # [S, G]: whether a guess counts as right; `UNKNOWN`

    def __post_init__(self) -> None:
        self.planes = self.planes or self.num_depths
        for name, (shape, kind) in _ARRAYS.items():
            setattr(self, name, np.zeros((0, *shape), dtype=kind))
        for name, kind in _BY_DEPTH.items():
            setattr(self, name, np.zeros((0, self.num_depths + 1), dtype=kind))
        for name, kind in BY_SLOT.items():
            setattr(self, name, np.zeros((0, self.slots), dtype=kind))
        self._given = self._right = np.zeros((0, 1), dtype=np.int64)
        self.reserve(8)

    @property
    def capacity(self) -> int:
        """The number of rows."""
        return len(self.present)

    def reserve(self, rows: int) -> None:
        """Makes room for as many sequences."""
        if (more := rows - self.capacity) <= 0:
            return
        for name in [*_ARRAYS, *_BY_DEPTH, *BY_SLOT, "_given", "_right"]:
            old = getattr(self, name)
            new = np.zeros((more, *old.shape[1:]), dtype=old.dtype)
            setattr(self, name, np.concatenate([old, new]))
        self.depth, self.target = self.depths[:, 0], self.targets[:, 0]
        self.exit_depth, self.forced = self.exit_depths[:, 0], self.given_depths[:, 0]

    def add(self, index: int, start: Start) -> None:
        """A sequence gets the row `index`."""
        depth, knobs = start.max_depth, start.knobs
        for name in [*_ARRAYS.keys() - {"life"}, *_BY_DEPTH, *BY_SLOT]:
            getattr(self, name)[index] = 0
        self.reasons.pop(index, None)
        self.life[index] += 1
        self.present[index] = True
        self.max_depth[index] = depth
        self.max_loops[index], self.min_loops[index] = knobs.max_loops, knobs.min_loops
        self.prefill_end[index] = start.prefill_end
        self.num_generated[index] = start.num_generated
        self.scored[index] = start.scored
        found = list(start.cached or [0])[:depth]
        self.done[index, : len(found) + 1] = [found[0], *found]
        self.settled[index] = self.done[index]
        if start.decoded is not None:
            decoded = list(found if self.decodes_in_passes else start.decoded)[:depth]
            self.decoded[index, 1 : len(decoded) + 1] = decoded
        known = [UNKNOWN if exits is None else int(exits) for exits in start.predetermined]
        self._predetermined[index, 1 : depth + 1] = known[:depth]
        given = knobs.exit_depths  # stand for what the exit rule would decide
        self._given = with_row(self._given, index, given, 0)
        self._right = with_row(self._right, index, knobs.guesses, UNKNOWN)
        last = min(knobs.max_loops, depth)
        exits = self._predetermined[index, : last + 1] != 0
        if given:
            exits[knobs.min_loops :] = True
            exits[[depth for depth in given if depth <= last]] = True
        exits[0] = False
        self.may_exit[index, : last + 1] = exits

    def remove(self, index: int) -> None:
        """The row is free."""
        self.present[index] = self.in_flight[index] = False
        self.life[index] += 1

    def begin(self, sequences: Ints, counts: Ints | int, wants_token: Bools | bool) -> Chunks:
        """`counts` new positions of each of `sequences`, none of them in flight; a token is wanted
        for the last one, or not. The chunks are at depth 0, to be encoded."""
        first = self.done[sequences, 0]
        end = first + counts
        self.begun[sequences], self.done[sequences, 0] = first, end
        self.in_flight[sequences], self.wants_token[sequences] = True, wants_token
        for array in (self.depth, self.exit_depth, self.age):
            array[sequences] = 0
        self.stalled[sequences] = False
        deepest = self.max_depth[sequences]
        least = np.minimum(self.min_loops[sequences], deepest)
        if self.full_prefill:
            least = np.where(self.prefilling(sequences), deepest, least)
        target = np.where(self.wants_token[sequences], deepest, np.minimum(least, self.planes))
        self.target[sequences] = target
        self.forced[sequences] = self.given(sequences, 0)
        self.number(sequences, 0)
        depth = np.zeros_like(first)
        return Chunks(sequences, depth, first, end, np.ones(len(sequences), dtype=bool))

    def given(self, sequences: Ints, slot: Ints | int) -> Ints:
        """The exit depths given for the tokens of the positions in `slot`; 0 for none."""
        number = np.minimum(self.num_generated[sequences] + slot, self._given.shape[1] - 1)
        return self._given[sequences, number]

    def number(self, sequences: Ints, slot: Ints | int) -> None:
        """Numbers the positions in `slot`, which begin."""
        self.begins[sequences] += 1
        self.numbers[sequences, slot] = self.begins[sequences]

    def right_guess(self, sequences: Ints, equal: Bools, later: int = 0) -> Bools:
        """Whether the guess of the newest token of each sequence, or of one `later`, counts as
        right; `equal`: whether it is."""
        number = self.num_generated[sequences] - 1 + later
        number = np.minimum(number, self._right.shape[1] - 1)
        replayed = self._right[sequences, number]
        return np.where(replayed == UNKNOWN, equal, replayed).astype(bool)

    def slot_of(self, chunks: Chunks) -> Ints:
        """The slot of the newest position of each chunk; 0 if the chunk ends before."""
        return np.where(chunks.newest, chunks.end - self.done[chunks.sequence, 0], 0)

    def fail_at(self, index: int, end: int, reason: str) -> bool:
        """What was computed of the position `end - 1` is useless. That fails the sequence, unless
        the position is a guess: then guesses are forgotten. Returns whether it has failed."""
        if end > self.certain(np.array([index]))[0]:
            self.lookahead[index], self.spoiled[index] = 0, True
            self.forget(np.array([index]))
            return False
        self.fail(index, reason)
        return True

    def certain(self, sequences: Ints) -> Ints:
        """How many positions of each sequence began with tokens that are certain."""
        return self.done[sequences, 0] - self.tentative[sequences]

    def forget(self, sequences: Ints) -> None:
        """No guessed position of `sequences` is in flight or computed any more."""
        guessed = self.tentative[sequences]
        self.done[sequences, 0] -= guessed
        self.in_flight[sequences] &= ~guessed
        self.tentative[sequences] = False
        self.life[sequences] += guessed  # nothing certain of them is under way
        self.ahead[sequences] = 0
        known = self.done[sequences, :1]
        for array in (self.done, self.settled, self.decoded):
            array[sequences] = np.minimum(array[sequences], known)

    def fail(self, index: int, reason: str) -> None:
        """What was computed is useless: no further pass and no token. The first reason counts."""
        self.reasons.setdefault(index, reason)
        self.failed[index] = True
        self.in_flight[index] = False

    def prefilling(self, sequences: Ints) -> Bools:
        """Whether the newest position is one of those known from the start."""
        return self.done[sequences, 0] <= self.prefill_end[sequences]

    def fills(self, sequences: Ints) -> Bools:
        """Whether the newest position runs at least to the last plane, wherever it exits."""
        if not self.full_prefill:
            return np.zeros(len(sequences), dtype=bool)
        return self.prefilling(sequences)

    def last_plane(self, sequences: Ints) -> Ints:
        """The deepest depth at which each of `sequences` has K/V."""
        return np.minimum(self.max_depth[sequences], self.planes)

    def copies_on_exit(self, sequences: Ints) -> Bools:
        """Whether deeper depths get the K/V and state with which the newest position exits: a
        generated token in `last_exited`."""
        if not self.last_exited:
            return np.zeros(len(sequences), dtype=bool)
        return ~self.prefilling(sequences)

    def refined(self, sequences: Ints) -> Bools:
        """Whether the positions in flight need no further pass."""
        return self.in_flight[sequences] & (self.depth[sequences] >= self.target[sequences])

    def ready(self, sequences: Ints) -> Bools:
        """Whether a token has exited, and its positions need no further pass."""
        refined = self.refined(sequences) & self.wants_token[sequences]
        return refined & (self.exit_depth[sequences] > 0)

    def undecided(self, sequences: Ints, slot: Ints | int = 0) -> Bools:
        """Whether the exit depth of the position in `slot` is still to be found."""
        wants = self.in_flight[sequences] & self.wants_token[sequences]
        return wants & (self.exit_depths[sequences, slot] == 0)

    def next_chunks(self, sequences: Ints) -> Chunks:
        """What the next pass has to compute of those `sequences` that have something to refine, in
        order."""
        chosen = sequences[self.in_flight[sequences] & ~self.refined(sequences)]
        depth, end = self.depth[chosen] + 1, self.done[chosen, 0]
        start = self.start_at(chosen, depth)
        chunks = Chunks(chosen, depth, start, end, np.ones(len(chosen), dtype=bool))
        prompt = self.prefill_end[chosen]
        if not self.last_exited or not (split := (start < prompt) & (prompt < end)).any():
            return chunks
        # One pass does both: a layer writes the K/V of all rows before any of them attends.
        return chunks.split(split, prompt)

    def start_at(self, sequences: Ints, depth: Ints) -> Ints:
        """The first position that a pass to `depth` [S] computes together with the newest one."""
        start = self.done[sequences, depth]
        if self.planes == self.num_depths:
            return start
        alone = depth > self.planes
        if (whole := self.scored[sequences]).any():
            alone &= ~(whole & self.prefilling(sequences))
        return np.where(alone, self.done[sequences, 0] - 1, start)

    def passes_ahead(self, chunks: Chunks, most: int) -> int:
        """How many passes, the one over `chunks` included, have the same positions, each one depth
        deeper, with nothing to decide in between. `chunks` is all that their sequences have to
        compute. At most `most`."""
        index, depth = chunks.sequence, chunks.depth
        if not chunks.newest.all():
            return 1
        target, undecided = self.target[index], self.undecided(index)
        passes = 1
        while passes < most:
            at = depth + passes - 1  # after which the next pass would follow
            going = at < target
            deeper = np.minimum(at + 1, self.num_depths)
            same = going & (self.start_at(index, deeper) == chunks.start)
            same &= ~(undecided & (self.predetermined_at(index, at) != 0))
            if not same.all():
                break
            passes += 1
        return passes

    def advance(self, chunks: Chunks, passes: int = 1) -> None:
        """The chunks are computed at their depths, those of the last of `passes` passes, and at the
        depths of the passes before."""
        index = chunks.sequence
        for earlier in range(passes):
            depth = chunks.depth - earlier
            as_far = self.done[index, depth] == chunks.start
            assert (as_far | (depth > self.planes)).all() or self.last_exited
            self.done[index, depth] = chunks.end
            if self.decodes_in_passes:
                along = ~self.scored[index] & (self.decoded[index, depth] == chunks.start)
                self.decoded[index[along], depth[along]] = chunks.end[along]
        newest = chunks.newest
        self.depths[index[newest], self.slot_of(chunks)[newest]] = chunks.depth[newest]
        if self.last_exited and not newest.all():
            at, depth = index[~newest], chunks.depth[~newest]
            over = self.copies_on_exit(at) & (chunks.end[~newest] == self.prefill_end[at])
            at, depth = at[over], depth[over]
            # The tokens since then were written here when they exited; the newest is in the pass.
            self.done[at, depth] = self.done[at, 0] - (self.depth[at] < depth)

    def predetermined_at(
        self, sequences: Ints, depth: Ints, slot: Ints | int = 0
    ) -> NDArray[np.int8]:
        """Whether the position in `slot` exits at `depth`: 0, 1, or `UNKNOWN` beforehand.

        A given exit depth counts as unknown, because it stands for what a model would decide, at
        any depth from `min_loops` on.
        """
        known = self._predetermined[sequences, depth]
        forced = self.given_depths[sequences, slot]
        if not forced.any():
            return known
        open_ = (depth >= self.min_loops[sequences]) | (depth == forced)
        replayed = (forced > 0) & (depth < self.max_loops[sequences])
        return np.where(replayed, np.where(open_, UNKNOWN, 0), known).astype(np.int8)

    def decide(self, sequences: Ints, depth: Ints, exits: Bools, slot: Ints | None = None) -> Bools:
        """The positions of `sequences` in `slot`, undecided so far, have reached `depth`; `exits`
        is what the exit rule decided. Returns which of them exit there."""
        slot = np.zeros_like(sequences) if slot is None else slot
        forced = self.given_depths[sequences, slot]
        leaving = np.where(forced > 0, depth == forced, exits)
        index, depth, slot = sequences[leaving], depth[leaving], slot[leaving]
        self.exit_depths[index, slot] = depth
        filled = np.where(self.fills(index) & (slot == 0), self.last_plane(index), 0)
        self.targets[index, slot] = np.maximum(depth, filled)
        copied = self.copies_on_exit(index)
        if copied.any():
            index, depth = index[copied], depth[copied]
            end = self.done[index, :1]
            deeper = np.arange(self.num_depths + 1) > depth[:, None]
            deeper &= np.arange(self.num_depths + 1) <= self.max_depth[index][:, None]
            deeper &= self.done[index] >= self.prefill_end[index][:, None]
            self.done[index] = np.where(deeper, end, self.done[index])
            self.settled[index] = np.where(deeper, end, self.settled[index])
        return leaving

    def settle(self, chunks: Chunks, passes: int) -> None:
        """The passes over `chunks`, as in `advance`, are over, and their states are finite."""
        for earlier in range(passes):
            at = chunks.sequence, chunks.depth - earlier
            self.settled[at] = np.minimum(np.maximum(self.settled[at], chunks.end), self.done[at])

    def chunks_to_decode(self, sequences: Ints) -> Chunks:
        """What the decoder has to compute for the tokens of `sequences`, in order: where they have
        exited, or else where they are."""
        depth, end = self.exit_depth[sequences], self.done[sequences, 0]
        depth = np.where(depth > 0, depth, self.depth[sequences])
        plane = np.minimum(depth, self.planes)
        # The newest one again, if it went through the decoder before it was known to exit.
        newest = np.ones(len(sequences), dtype=bool)
        if not self.decoder_attends:
            own = self.to_decode_from(sequences, depth, end)
            return Chunks(sequences, depth, own, end, newest)
        start = self.to_decode_from(sequences, plane, end)
        deep, copying = depth > self.planes, self.copies_on_exit(sequences)
        if not copying.any() and not deep.any():
            return Chunks(sequences, depth, start, end, newest)
        # Generated positions that are copied were decoded once, for all depths a token may exit at.
        prompt = self.prefill_end[sequences]
        behind = copying & (start < prompt)
        deep &= ~copying
        whole = deep & self.scored[sequences] & self.prefilling(sequences)
        own = np.where(deep | copying, end - 1, start)
        own = np.where(whole, np.minimum(self.decoded[sequences, depth], end - 1), own)
        before = Chunks(sequences, plane, start, np.where(behind, prompt, end), ~newest)
        lacking = behind | (deep & (self.decoded[sequences, plane] < end))
        return Chunks(sequences, depth, own, end, newest).after(before, lacking)

    def to_decode_from(self, sequences: Ints, depth: Ints, end: Ints) -> Ints:
        """Where what the decoder has to compute at `depth` for the position before `end` starts."""
        start = np.minimum(self.decoded[sequences, depth], end - 1)
        if self.decoder_attends:
            return start
        return np.where(self.scored[sequences], start, end - 1)

    def advance_decoder(self, chunks: Chunks) -> None:
        """The chunks have decoder K/V at their depths."""
        # The newest position of a sequence may follow on another chunk of it.
        for chosen in (~chunks.newest, chunks.newest):
            index, depth = chunks.sequence[chosen], chunks.depth[chosen]
            follows = self.decoded[index, depth] == chunks.start[chosen]
            self.decoded[index[follows], depth[follows]] = chunks.end[chosen][follows]

    def finish(self, sequences: Ints) -> None:
        """The positions in flight are done; their token, if one was wanted, is sampled."""
        self.in_flight[sequences] = False
        self.num_generated[sequences] += self.wants_token[sequences]

    def catch_up(self, chunks: Chunks) -> int:
        """How many rows are positions before those in flight."""
        before = np.minimum(chunks.end, self.begun[chunks.sequence]) - chunks.start
        return int(np.maximum(before, 0).sum())
