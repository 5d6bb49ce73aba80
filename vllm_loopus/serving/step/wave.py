"""Guessed positions: a sequence goes on with the token it will probably get.

When a position has made `draft_depth` passes, its guess is the most likely token of the decoder at
that depth. The next position begins with it while the position itself goes deeper, so several
positions of a sequence are in flight at falling depths: a wave. When the certain position exits,
its token is sampled as ever. If it is the guess, the next position is certain, with all that has
been computed for it. If not, the guessed positions are forgotten.

In `exact`, K/V is a function of depth and tokens alone, so a guess decides nothing: tokens, exit
depths and seeds are those without guesses.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints
from vllm_loopus.serving.step.staircase import BY_SLOT, Staircases
from vllm_loopus.serving.step.wave_plan import WavePlan

NOT_READ = -1  # a guess that is still on the device


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

    `plan`: when and how far they guess. `stairs.lookahead` is the limit of each sequence.
    """

    def __init__(self, stairs: Staircases, plan: WavePlan) -> None:
        self._stairs = stairs
        self.plan = plan
        self._counts = GuessCounts()

    def counted(self) -> GuessCounts:
        """Counts from zero again; what `drop` took back of guesses counted before, from less."""
        counts = self._counts
        self._counts = GuessCounts(made=min(counts.made, 0))
        return replace(counts, made=max(counts.made, 0))

    def guessing(self, sequences: Ints) -> bool:
        """Whether one of `sequences` guesses, or has guessed positions."""
        stairs = self._stairs
        may = (stairs.lookahead[sequences] > 0) & self.plan.allows(sequences)
        return bool((may | stairs.tentative[sequences] | (stairs.ahead[sequences] > 0)).any())

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

    def to_decode(self, sequences: Ints, possible: Ints, leaving: Bools) -> Chunks:
        """What the decoder computes for the next guesses of `sequences`: the newest positions in
        flight that are deep enough, where another one may begin. `possible` [S]: how many may have
        begun, for blocks and the limits of requests. `leaving` [S]: whose certain position leaves
        in the same call."""
        stairs = self._stairs
        slot = stairs.ahead[sequences]
        depth = stairs.depths[sequences, slot]
        exited = stairs.exit_depths[sequences, slot] > 0
        may = stairs.in_flight[sequences] & stairs.wants_token[sequences]
        limit = np.minimum(stairs.lookahead[sequences], self.plan.lookahead) + leaving
        may &= (slot < np.minimum(limit, possible)) & (depth > 0) & self.plan.allows(sequences)
        may &= stairs.lookahead[sequences] > 0
        # If the certain position has exited, its token comes from the sampler.
        may &= np.where(exited, slot > 0, depth >= self.plan.draft_depth)
        index, slot, depth = sequences[may], slot[may], depth[may]
        end = stairs.done[index, 0] + slot
        start = stairs.to_decode_from(index, depth, end)
        return Chunks(index, depth, start, end, np.ones(len(index), dtype=bool))

    def begin(self, chunks: Chunks) -> Chunks:
        """The newest positions of `chunks`, which are going through the decoder, give the tokens
        that the next ones begin with: these are in flight. Returns the chunks that do so."""
        stairs, index = self._stairs, chunks.sequence
        may = stairs.done[index, 0] + stairs.ahead[index] == chunks.end
        chunks = chunks[may & ~stairs.failed[index]]
        sequences = chunks.sequence
        stairs.ahead[sequences] += 1
        slot = stairs.ahead[sequences]
        stairs.depths[sequences, slot] = stairs.exit_depths[sequences, slot] = 0
        stairs.targets[sequences, slot] = stairs.max_depth[sequences]
        stairs.given_depths[sequences, slot] = stairs.given(sequences, slot)
        stairs.number(sequences, slot)
        stairs.guesses[sequences, slot] = NOT_READ
        stairs.guess_depths[sequences, slot] = chunks.depth
        self._counts.made += len(sequences)
        return chunks

    def drop(self, sequences: Ints) -> None:
        """The tokens of `sequences` are being sampled from the rows that guessed them: no guess is
        needed where no pass has begun with it."""
        stairs = self._stairs
        drops = (stairs.ahead[sequences] == 1) & (stairs.depths[sequences, 1] == 0)
        stairs.ahead[sequences[drops]] = 0
        self._counts.made -= int(np.count_nonzero(drops))

    def fill(self, chunks: Chunks, life: Ints, tokens: Ints) -> None:
        """The guesses after the newest positions of `chunks` are known on the host. `life` [C]:
        of their sequences when they were made."""
        stairs, index = self._stairs, chunks.sequence
        slot = chunks.end + 1 - stairs.done[index, 0]
        there = (life == stairs.life[index]) & (slot <= stairs.ahead[index])
        there &= (slot > 0) | (stairs.tentative[index] & (slot == 0))
        stairs.guesses[index[there], slot[there]] = tokens[there]

    def go_on(self, sequences: Ints) -> None:
        """The first guesses of `sequences` are taken for the tokens that are being sampled, until
        these are known: then `confirm` or `reject`."""
        self._advance(sequences)
        self._stairs.tentative[sequences] = True

    def confirm(self, sequences: Ints) -> None:
        """The first guesses of `sequences` are the tokens that were sampled: the positions that
        began with them are the certain ones now."""
        stairs = self._stairs
        self._advance(sequences[~stairs.tentative[sequences]])
        stairs.tentative[sequences] = False
        depth = stairs.guess_depths[sequences, 0]
        self._counts.confirmed += depth.tolist()
        self.plan.observe(sequences, depth, True)

    def _advance(self, sequences: Ints) -> None:
        """The position in slot 1 is the newest certain one."""
        stairs = self._stairs
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
        first = np.where(stairs.tentative[sequences], 0, 1)  # slot of the wrong guess
        depth = stairs.guess_depths[sequences, first]
        self._counts.rejected += depth.tolist()
        self.plan.observe(sequences, depth, False)
        slots = np.arange(stairs.slots)
        guessed = (slots >= first[:, None]) & (slots <= stairs.ahead[sequences][:, None])
        self._counts.wasted += int((stairs.depths[sequences] * guessed).sum())
        stairs.forget(sequences)
        # What nobody will read is computed again, positions that came along included.
        known = stairs.settled[sequences, 1:]
        stairs.done[sequences, 1:] = np.minimum(stairs.done[sequences, 1:], known)
        decoded, done = stairs.decoded[sequences, 1:], stairs.done[sequences, 1:]
        stairs.decoded[sequences, 1:] = np.minimum(decoded, done)
        stairs.life[sequences] += 1


def undecoded(chunks: Chunks, decoded: Ints) -> Chunks:
    """`chunks`, one for each sequence, from where the decoder's watermarks `decoded` [S, N + 1] are
    at their depths, at least the newest row of each."""
    start = np.minimum(decoded[chunks.sequence, chunks.depth], chunks.end - 1)
    return Chunks(chunks.sequence, chunks.depth, start, chunks.end, chunks.newest)
