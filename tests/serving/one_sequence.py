"""The definition of a staircase, for one sequence: how far each position has been computed, as
watermarks by depth. `step/staircase.py` is checked against it.

`done[r]` positions, from 0 on, have K/V and state at depth r; `done[0]` have been encoded. A token
that goes to depth r takes along the positions from `done[r]` on that come before it (policy
`exact`), so `done[0] >= done[1] >= ... >= done[N]`. The decoder has separate watermarks,
`decoded[r] <= done[r]`: positions that have decoder K/V at depth r. They are not ordered by depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_loopus.serving.knobs.request import RequestKnobs


@dataclass(slots=True)
class Chunk:
    """Positions `start .. end - 1` of a sequence, to be computed at `depth` as one causal chunk.

    Each position is one row of the model call.
    """

    sequence: "LoopedSequence"
    depth: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def newest(self) -> bool:
        """Whether the sequence's newest position is in the chunk."""
        return self.end == self.sequence.done[0]

    @property
    def catch_up(self) -> int:
        """How many of its positions come before those in flight."""
        return max(min(self.end, self.sequence.begun) - self.start, 0)


class LoopedSequence:
    """One running sequence. Its newest positions are *in flight* from `begin` to `finish`.

    - A token, including the last one of the prompt, runs until it exits and takes along the
      positions that are not computed at its depths. A prompt chunk that is not the last runs to the
      least depth a token may exit at, which the prompt needs in any case.
    - With `full_prefill`, a prompt runs to full depth instead, so that others find it in the prefix
      cache. The exit depth of its last position is noted on the way.

    In `last_exited`, a generated position has K/V at all depths once its token has exited, and
    decoder K/V at all depths a token may exit at. Prompt positions only have it up to the
    watermarks: `done[r]` and `decoded[r]` stay below `prefill_end` until a token goes to depth r
    and the prompt has been computed there.
    """

    def __init__(
        self,
        request_id: str,
        knobs: RequestKnobs,
        max_depth: int,
        prefill_end: int,
        cached: Sequence[int] | None = None,
        decoded: Sequence[int] | None = None,
        last_exited: bool = False,
        num_generated: int = 0,
        full_prefill: bool = False,
        predetermined: Sequence[bool | None] | None = None,
    ) -> None:
        """
        - `max_depth`: planes that the sequence may need. `prefill_end`: tokens known now.
        - `cached[r - 1]`: positions found at depth r in the prefix cache. `decoded[r - 1]`: how
          many of them have decoder K/V at depth r.
        - `last_exited`: the K/V policy. `num_generated`: tokens generated so far.
        - `predetermined[r - 1]`: whether a token exits at depth r, None if the exit rule computes
          that (`ExitRule.predetermined`).
        """
        self.request_id = request_id
        self.knobs = knobs
        self.full_prefill = full_prefill
        self._predetermined = predetermined or [None] * max_depth
        given = knobs.exit_depths  # stand for what the exit rule would decide
        self._exits = [
            depth
            for depth, exits in enumerate(self._predetermined[: knobs.max_loops], start=1)
            if exits is not False or depth in given or (given and depth >= knobs.min_loops)
        ]
        self.max_depth = max_depth
        self.prefill_end = prefill_end
        self.last_exited = last_exited
        self.num_generated = num_generated
        found = list(cached or [0] * max_depth)[:max_depth]
        self.done = [found[0], *found]
        self.begun = found[0]  # the first position in flight
        self.decoded = [0, *(decoded or [0] * max_depth)[:max_depth]]
        self.in_flight = False
        self.wants_token = False
        self.depth = 0  # that the newest position has reached
        self.exit_depth: int | None = None

    def begin(self, count: int, wants_token: bool) -> None:
        """`count` new positions are encoded; a token is wanted for the last one, or not."""
        assert not self.in_flight and count > 0
        self.begun = self.done[0]
        self.done[0] += count
        self.in_flight, self.wants_token = True, wants_token
        self.depth, self.exit_depth = 0, None

    @property
    def prefilling(self) -> bool:
        """Whether the newest position is one of those known from the start."""
        return self.done[0] <= self.prefill_end

    @property
    def fills(self) -> bool:
        """Whether the newest position runs to full depth, independent of its exit depth."""
        return self.full_prefill and self.prefilling

    @property
    def copies_on_exit(self) -> bool:
        """Whether deeper depths get the K/V and state with which the newest position exits: a
        generated token in `last_exited`."""
        return self.last_exited and not self.prefilling

    @property
    def target(self) -> int:
        """The depth that the newest position goes to, as far as is known."""
        if self.fills:
            return self.max_depth
        if not self.wants_token:
            return min(self.knobs.min_loops, self.max_depth)
        return self.max_depth if self.exit_depth is None else self.exit_depth

    def next_chunks(self) -> list[Chunk]:
        """What the next pass has to compute, in order; empty if there is nothing to refine."""
        if not self.in_flight or self.refined:
            return []
        depth, end = self.depth + 1, self.done[0]
        if self.last_exited and self.done[depth] < self.prefill_end < end:
            # One pass does both: a layer writes the K/V of all rows before any of them attends.
            prompt = Chunk(self, depth, self.done[depth], self.prefill_end)
            return [prompt, Chunk(self, depth, end - 1, end)]
        return [Chunk(self, depth, self.done[depth], end)]

    def passes_ahead(self, chunk: Chunk) -> int:
        """How many passes, that over `chunk` included, have the same positions, each one depth
        deeper, with nothing to decide in between. `chunk` is all that the sequence has to
        compute."""
        if not chunk.newest:
            return 1
        depth = chunk.depth
        while depth < self.target and self.done[depth + 1] == chunk.start:
            if self.undecided and self.predetermined_at(depth) is not False:
                break
            depth += 1
        return depth - chunk.depth + 1

    def advance(self, chunk: Chunk, passes: int = 1) -> None:
        """The chunk is computed at its depth, the last of `passes` passes over it, and at the
        depths of those before."""
        for depth in range(chunk.depth - passes + 1, chunk.depth + 1):
            assert chunk.start == self.done[depth] <= chunk.end <= self.done[depth - 1]
            self.done[depth] = chunk.end
        if chunk.newest:
            self.depth = chunk.depth
        elif self.copies_on_exit and chunk.end == self.prefill_end:
            self.done[chunk.depth] = self.done[0] - 1  # the tokens since then were written here

    @property
    def undecided(self) -> bool:
        """Whether the exit depth of the newest position is still to be found."""
        return self.in_flight and self.wants_token and self.exit_depth is None

    @property
    def forced_depth(self) -> int | None:
        """The exit depth given for the token in flight, if any."""
        depths = self.knobs.exit_depths
        return depths[self.num_generated] if self.num_generated < len(depths) else None

    def exits_at(self, depth: int, exits: bool) -> bool:
        """Whether the newest position exits at `depth`; `exits` is what the exit rule decided."""
        return exits if self.forced_depth is None else depth == self.forced_depth

    def predetermined_at(self, depth: int) -> bool | None:
        """Whether the newest position exits at `depth`, if that is known beforehand, else None.

        A given exit depth counts as unknown, because it stands for what a model would decide, at
        any depth from `min_loops` on.
        """
        if self.forced_depth is None or depth >= self.knobs.max_loops:
            return self._predetermined[depth - 1]
        return None if depth >= self.knobs.min_loops or depth == self.forced_depth else False

    def other_exits(self, depth: int) -> list[int]:
        """The depths except `depth` at which a token may exit: those that need decoder K/V."""
        return [other for other in self._exits if other != depth]

    def decide(self, depth: int, exits: bool) -> None:
        """The newest position has reached `depth`; `exits` is what the exit rule decided."""
        if self.exits_at(depth, exits):
            self.exit_depth = depth
            if self.copies_on_exit:
                for deeper in range(depth + 1, self.max_depth + 1):
                    if self.done[deeper] >= self.prefill_end:
                        self.done[deeper] = self.done[0]

    @property
    def refined(self) -> bool:
        """Whether the positions in flight need no further pass."""
        return self.in_flight and self.depth >= self.target

    def chunks_to_decode(self) -> list[Chunk]:
        """What the decoder has to compute for the newest position's token, in order."""
        assert self.exit_depth is not None
        depth, end = self.exit_depth, self.done[0]
        if not self.copies_on_exit:
            return [Chunk(self, depth, self.decoded[depth], end)]
        # Generated positions were decoded once, for all depths a token may exit at.
        newest = Chunk(self, depth, end - 1, end)
        if self.decoded[depth] >= self.prefill_end:
            return [newest]
        return [Chunk(self, depth, self.decoded[depth], self.prefill_end), newest]

    def advance_decoder(self, chunk: Chunk) -> None:
        """The chunk has decoder K/V at its depth."""
        if chunk.start == self.decoded[chunk.depth]:
            self.decoded[chunk.depth] = chunk.end

    def finish(self) -> None:
        """The positions in flight are done; their token, if one was wanted, is sampled."""
        assert self.in_flight
        self.in_flight = False
        self.num_generated += self.wants_token
