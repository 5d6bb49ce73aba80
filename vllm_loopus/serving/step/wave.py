"""Guessed positions: a sequence goes on with the token it will probably get.

When a position has made `draft_depth` passes, its guess is the most likely token of the decoder at
that depth. The next position begins with it while the position itself goes deeper, so several
positions of a sequence are in flight at falling depths: a wave. When the certain position exits,
its token is sampled as ever. If it is the guess, the next position is certain, with all that has
been computed for it. If not, the guessed positions are forgotten.

In `exact`, K/V is a function of depth and tokens alone, so a guess decides nothing: tokens, exit
depths and seeds are those without guesses.
"""

from dataclasses import dataclass, field

import numpy as np

from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints
from vllm_loopus.serving.step.staircase import BY_SLOT, Staircases


@dataclass
class GuessCounts:
    """What guesses did since they were counted last.

    - `made`: guesses. `confirmed`, `rejected`: the depths at which those were made whose token is
      known since. Guesses that followed from a rejected one are in neither.
    - `wasted`: rows of passes for positions that were forgotten.
    """

    made: int = 0
    confirmed: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    wasted: int = 0


class Waves:
    """The guessed positions of all sequences of `stairs`.

    `draft_depth`: passes before a guess. How many positions of a sequence may be guessed at once is
    in `stairs.lookahead`.
    """

    def __init__(self, stairs: Staircases, draft_depth: int) -> None:
        self._stairs = stairs
        self.draft_depth = draft_depth
        self._counts = GuessCounts()

    def counted(self) -> GuessCounts:
        """Counts from zero again."""
        counts, self._counts = self._counts, GuessCounts()
        return counts

    def guessing(self, sequences: Ints) -> bool:
        """Whether one of `sequences` guesses, or has guessed positions."""
        stairs = self._stairs
        return bool((stairs.lookahead[sequences] | stairs.ahead[sequences]).any())

    def next_chunks(self, sequences: Ints) -> Chunks:
        """What the next pass may compute of guessed positions of `sequences`, in order of slots.

        A position waits until all before it are as deep as it would be, or have exited. Those that
        have exited come along as far as they were not computed there.
        """
        stairs = self._stairs
        flying = sequences[stairs.in_flight[sequences] & (stairs.ahead[sequences] > 0)]
        parts: list[Chunks] = []
        reached = self._reached(flying, 0)
        for slot in range(1, int(stairs.ahead[flying].max(initial=0)) + 1):
            there = stairs.ahead[flying] >= slot
            flying, reached = flying[there], reached[there]
            depth = stairs.depths[flying, slot] + 1
            goes = (depth <= stairs.targets[flying, slot]) & (depth <= reached)
            index, at = flying[goes], depth[goes]
            parts.append(
                Chunks(
                    index,
                    at,
                    stairs.done[index, at],
                    stairs.done[index, 0] + slot,
                    np.ones(len(index), dtype=bool),
                )
            )
            reached = np.minimum(reached, self._reached(flying, slot))
        return Chunks.join(parts)

    def _reached(self, sequences: Ints, slot: int) -> Ints:
        """How deep positions after that in `slot` may go: as deep as it is, or anywhere if it has
        exited and needs no further pass."""
        stairs = self._stairs
        depth, target = stairs.depths[sequences, slot], stairs.targets[sequences, slot]
        exited = (stairs.exit_depths[sequences, slot] > 0) & (depth >= target)
        return np.where(exited, stairs.num_depths, depth)

    def to_decode(self, sequences: Ints, possible: Ints) -> Chunks:
        """What the decoder computes for the next guesses of `sequences`: the newest positions in
        flight that are deep enough, where another one may begin. `possible` [S]: whether it has a
        block and is within the limits of its request, by slot."""
        stairs = self._stairs
        slot = stairs.ahead[sequences]
        depth = stairs.depths[sequences, slot]
        exited = stairs.exit_depths[sequences, slot] > 0
        may = stairs.in_flight[sequences] & stairs.wants_token[sequences]
        may &= (slot < np.minimum(stairs.lookahead[sequences], possible)) & (depth > 0)
        # If the certain position has exited, its token comes from the sampler.
        may &= np.where(slot > 0, exited | (depth >= self.draft_depth), ~exited)
        may &= exited | (depth >= self.draft_depth)
        index, slot, depth = sequences[may], slot[may], depth[may]
        end = stairs.done[index, 0] + slot
        start = np.minimum(stairs.decoded[index, depth], end - 1)
        return Chunks(index, depth, start, end, np.ones(len(index), dtype=bool))

    def begin(self, sequences: Ints, tokens: Ints, depth: Ints) -> None:
        """`sequences` guess `tokens` at `depth` after their newest positions: the next ones are in
        flight."""
        stairs = self._stairs
        stairs.ahead[sequences] += 1
        slot = stairs.ahead[sequences]
        stairs.depths[sequences, slot] = stairs.exit_depths[sequences, slot] = 0
        stairs.targets[sequences, slot] = stairs.max_depth[sequences]
        stairs.forceds[sequences, slot] = stairs.given(sequences, slot)
        stairs.guesses[sequences, slot] = tokens
        stairs.guess_depths[sequences, slot] = depth
        self._counts.made += len(sequences)

    def confirm(self, sequences: Ints) -> None:
        """The first guesses of `sequences` are the tokens that were sampled: the positions that
        began with them are the certain ones now."""
        stairs = self._stairs
        self._counts.confirmed += stairs.guess_depths[sequences, 1].tolist()
        for name in BY_SLOT:
            array = getattr(stairs, name)
            array[sequences, :-1] = array[sequences, 1:]
            array[sequences, -1] = 0
        stairs.begun[sequences] = stairs.done[sequences, 0]
        stairs.done[sequences, 0] += 1
        stairs.ahead[sequences] -= 1
        stairs.in_flight[sequences] = stairs.wants_token[sequences] = True
        stairs.age[sequences] = 0
        stairs.stalled[sequences] = False

    def reject(self, sequences: Ints) -> None:
        """Guessed positions of `sequences` are forgotten, and what is not read yet of them."""
        stairs = self._stairs
        self._counts.rejected += stairs.guess_depths[sequences, 1].tolist()
        slots = np.arange(stairs.slots)
        guessed = (slots > 0) & (slots <= stairs.ahead[sequences][:, None])
        self._counts.wasted += int((stairs.depths[sequences] * guessed).sum())
        stairs.forget(sequences)
        stairs.life[sequences] += 1


def without(chunks: Chunks, others: Chunks) -> Chunks:
    """`chunks` of a decoder call, without the rows that chunks of `others` have at the same
    depth."""
    if not len(chunks) or not len(others):
        return chunks
    last = others[others.newest]
    place = np.full(int(max(chunks.sequence.max(), last.sequence.max())) + 1, -1)
    place[last.sequence] = np.arange(len(last))
    at = place[chunks.sequence]
    same: Bools = (at >= 0) & (last.depth[at] == chunks.depth)
    start = np.where(same, np.maximum(chunks.start, last.end[at]), chunks.start)
    return Chunks(chunks.sequence, chunks.depth, start, chunks.end, chunks.newest)
