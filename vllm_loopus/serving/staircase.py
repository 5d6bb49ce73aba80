"""How far each position of a sequence has come: watermarks by depth, a staircase.

Pure bookkeeping, without tensors: the property tests drive it without a model.

`done[r]` positions, from 0 on, have K/V and state at depth r; `done[0]` have been encoded. A token
that goes to depth r takes the positions `done[r] ..` below it along (policy `exact`, see
`semantics.md`), so `done[0] >= done[1] >= ... >= done[N]`. The decoder has watermarks of its own,
`decoded[r] <= done[r]`: positions whose decoder K/V at depth r is there. They are not ordered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_loopus.serving.knobs import RequestKnobs


@dataclass(slots=True)
class Rows:
    """Positions `start .. end - 1` of a sequence, to be computed at `depth` as a causal chunk."""

    sequence: "LoopedSequence"
    depth: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def newest(self) -> bool:
        """Whether the sequence's newest position is among the rows."""
        return self.end == self.sequence.done[0]

    @property
    def catch_up(self) -> int:
        """How many of the rows are positions before those in flight."""
        return max(min(self.end, self.sequence.begun) - self.start, 0)


class LoopedSequence:
    """One running sequence. Its newest positions are *in flight* from `begin` to `finish`.

    - A token, the prompt's last one included, runs until it leaves, and takes along what is above
      the watermarks. A prompt chunk that is not the last runs to the least depth to leave at, which
      the prompt will need in any case.
    - With `full_prefill`, a prompt runs to the full depth instead, for others to find it in the
      prefix cache; the exit depth of its last position is noted on the way.

    In `last_exited` (`takes_over`) generated positions are there at all depths once their token has
    left, decoded at all depths to leave at, prompt positions below the watermarks only. `done[r]`
    then stays below `prefill_end`, and `decoded[r]` with it, until a token goes to depth r and the
    prompt has been taken there.
    """

    def __init__(
        self,
        request_id: str,
        knobs: RequestKnobs,
        max_depth: int,
        prefill_end: int,
        cached: Sequence[int] | None = None,
        decoded: Sequence[int] | None = None,
        takes_over: bool = False,
        num_generated: int = 0,
        full_prefill: bool = False,
        foregone: Sequence[bool | None] | None = None,
    ) -> None:
        """`max_depth`: planes that the sequence may need. `prefill_end`: tokens known now.
        `cached[r - 1]`: positions found at depth r in the prefix cache; `decoded[r - 1]`: of those,
        decoded at depth r already. `takes_over`: policy `last_exited`. `num_generated`: tokens
        generated so far. `foregone[r - 1]`: whether a token leaves at depth r, None where that is
        computed (`HaltingRule.foregone`).
        """
        self.request_id = request_id
        self.knobs = knobs
        self.full_prefill = full_prefill
        self._foregone = foregone or [None] * max_depth
        given = knobs.exit_depths  # they stand for what a head would decide (`foregone_at`)
        self._exits = [
            depth
            for depth, leaves in enumerate(self._foregone[: knobs.max_loops], start=1)
            if leaves is not False or depth in given or (given and depth >= knobs.min_loops)
        ]
        self.max_depth = max_depth
        self.prefill_end = prefill_end
        self.takes_over = takes_over
        self.num_generated = num_generated
        found = list(cached or [0] * max_depth)[:max_depth]
        self.done = [found[0], *found]
        self.begun = found[0]  # the first position in flight
        self.decoded = [0, *(decoded or [0] * max_depth)[:max_depth]]
        self.in_flight = False
        self.wants_token = False
        self.depth = 0  # that the newest position has reached
        self.stalled = False  # in the last pass, for want of blocks
        self.exit_depth: int | None = None
        self.survival = 1.0  # see HaltingRule
        self.age = 0  # steps in flight
        self.failure: str | None = None  # why nothing more can be computed

    def begin(self, count: int, wants_token: bool) -> None:
        """`count` new positions are encoded; the last one's token is wanted or not."""
        assert not self.in_flight and count > 0
        self.begun = self.done[0]
        self.done[0] += count
        self.in_flight, self.wants_token = True, wants_token
        self.depth, self.exit_depth, self.survival, self.age = 0, None, 1.0, 0
        self.stalled = False

    def fail(self, reason: str) -> None:
        """What was computed is of no use: no further pass and no token. The first reason counts."""
        self.failure = self.failure or reason
        self.in_flight = False

    @property
    def prefilling(self) -> bool:
        """Whether the newest position is one of those known from the start."""
        return self.done[0] <= self.prefill_end

    @property
    def fills(self) -> bool:
        """Whether the newest position runs to the full depth, wherever it leaves."""
        return self.full_prefill and self.prefilling

    @property
    def writes_through(self) -> bool:
        """Whether deeper depths take over what the newest position has: a generated token in
        `last_exited`."""
        return self.takes_over and not self.prefilling

    @property
    def target(self) -> int:
        """The depth that the newest position goes to, as far as is known."""
        if self.fills:
            return self.max_depth
        if not self.wants_token:
            return min(self.knobs.min_loops, self.max_depth)
        return self.max_depth if self.exit_depth is None else self.exit_depth

    def next_rows(self) -> list[Rows]:
        """What the next pass has to compute, in order; nothing when there is nothing to refine."""
        if not self.in_flight or self.refined:
            return []
        depth, end = self.depth + 1, self.done[0]
        if self.takes_over and self.done[depth] < self.prefill_end < end:
            # One pass does for both: a layer writes the K/V of all rows before any of them attends.
            prompt = Rows(self, depth, self.done[depth], self.prefill_end)
            return [prompt, Rows(self, depth, end - 1, end)]
        return [Rows(self, depth, self.done[depth], end)]

    def passes_ahead(self, rows: Rows) -> int:
        """How many passes, that over `rows` included, have the same positions, each a depth deeper
        than the last, with nothing to decide in between; `rows` are all that it has to compute."""
        if not rows.newest:
            return 1
        depth = rows.depth
        while depth < self.target and self.done[depth + 1] == rows.start:
            if self.undecided and self.foregone_at(depth) is not False:
                break
            depth += 1
        return depth - rows.depth + 1

    def advance(self, rows: Rows, passes: int = 1) -> None:
        """`rows` have K/V and state at their depth now, the last that `passes` have taken them
        to, and at those before it."""
        for depth in range(rows.depth - passes + 1, rows.depth + 1):
            assert rows.start == self.done[depth] <= rows.end <= self.done[depth - 1]
            self.done[depth] = rows.end
        if rows.newest:
            self.depth = rows.depth
        elif self.writes_through and rows.end == self.prefill_end:
            self.done[rows.depth] = self.done[0] - 1  # the tokens since then were written here

    @property
    def undecided(self) -> bool:
        """Whether the newest position still looks for its exit depth."""
        return self.in_flight and self.wants_token and self.exit_depth is None

    @property
    def forced_depth(self) -> int | None:
        """The exit depth given for the token in flight, if any."""
        depths = self.knobs.exit_depths
        return depths[self.num_generated] if self.num_generated < len(depths) else None

    def leaves_at(self, depth: int, leaves: bool) -> bool:
        """Whether the newest position leaves at `depth`; `leaves` is the halting rule's word."""
        return leaves if self.forced_depth is None else depth == self.forced_depth

    def foregone_at(self, depth: int) -> bool | None:
        """Whether the newest position leaves at `depth`, as far as that can be said beforehand.

        A given depth spares nothing: it stands for what a model would decide, at any depth from
        `min_loops` on.
        """
        if self.forced_depth is None or depth >= self.knobs.max_loops:
            return self._foregone[depth - 1]
        return None if depth >= self.knobs.min_loops or depth == self.forced_depth else False

    def other_exits(self, depth: int) -> list[int]:
        """The depths but `depth` at which a token may leave: those that decoder K/V is for."""
        return [at for at in self._exits if at != depth]

    def decide(self, depth: int, leaves: bool) -> None:
        """The newest position reached `depth`; `leaves` is the halting rule's word."""
        if self.leaves_at(depth, leaves):
            self.exit_depth = depth
            if self.writes_through:
                for deeper in range(depth + 1, self.max_depth + 1):
                    if self.done[deeper] >= self.prefill_end:
                        self.done[deeper] = self.done[0]

    @property
    def refined(self) -> bool:
        """Whether the positions in flight need no further pass."""
        return self.in_flight and self.depth >= self.target

    def rows_to_decode(self) -> list[Rows]:
        """What the decoder needs for the newest position's token, in order."""
        assert self.exit_depth is not None
        depth, end = self.exit_depth, self.done[0]
        if not self.writes_through:
            return [Rows(self, depth, self.decoded[depth], end)]
        # Generated positions were decoded once, for all depths to leave at.
        newest = Rows(self, depth, end - 1, end)
        if self.decoded[depth] >= self.prefill_end:
            return [newest]
        return [Rows(self, depth, self.decoded[depth], self.prefill_end), newest]

    def advance_decoder(self, rows: Rows) -> None:
        """`rows` have decoder K/V at their depth now."""
        if rows.start == self.decoded[rows.depth]:
            self.decoded[rows.depth] = rows.end

    def finish(self) -> None:
        """The positions in flight are done; their token, if wanted, is sampled."""
        assert self.in_flight
        self.in_flight = False
        self.num_generated += self.wants_token
