"""Several tokens of a sequence in one step.

Guessed positions that have exited behind the certain one go through the decoder in its call. What
the decoder takes for most likely there are the next tokens of the answer, as long as each of the
positions began with the right token. So this is for sequences whose tokens are the most likely ones
in any case (`Staircases.greedy`); the tokens of others come one a step from vLLM's sampler.
"""

import numpy as np

from vllm_loopus.serving.step.chunks import Chunks, Ints
from vllm_loopus.serving.step.staircase import Staircases


class FurtherTokens:
    """The most likely tokens of guessed positions in one decoder call, until they are used."""

    def __init__(self, stairs: Staircases) -> None:
        self._stairs = stairs
        # In the decoder call under way: chunks, with their slots and the lives of their sequences.
        self._under_way: tuple[Chunks, Ints, Ints] | None = None
        # By sequence and slot at the time of the call: depth (0: not in it), life and token.
        self._depth = self._life = self._token = np.zeros((0, stairs.slots), dtype=np.int64)
        self._given: list[int] = []

    def chunks(self, leaving: Ints, guessing: Ints, passing: bool) -> list[Chunks]:
        """Positions behind the certain ones of `leaving` that have exited, one `Chunks` for each
        slot. Not the newest ones of `guessing`, which go through the decoder in any case.
        `passing`: also positions that may exit in the pass under way."""
        stairs, parts = self._stairs, []
        index = leaving[stairs.greedy[leaving]]
        last = stairs.ahead.copy()
        last[guessing] -= 1
        for slot in range(1, int(last[index].max(initial=0)) + 1):
            index = index[last[index] >= slot]
            exited = stairs.exit_depths[index, slot]
            depth = stairs.depths[index, slot]
            goes = (depth > 0) & ((exited > 0) | passing)
            index, depth = index[goes], np.where(exited > 0, exited, depth)[goes]
            end = stairs.done[index, 0] + slot
            parts.append(Chunks(index, depth, end - 1, end, np.ones(len(index), dtype=bool)))
        return parts

    def expect(self, chunks: Chunks) -> None:
        """The decoder computes what is most likely after `chunks`."""
        stairs, index = self._stairs, chunks.sequence
        self._under_way = chunks, chunks.end - stairs.done[index, 0], stairs.life[index]

    def fill(self, tokens: Ints) -> None:
        """These are the tokens [C] that were expected."""
        assert self._under_way is not None
        (chunks, slot, life), self._under_way = self._under_way, None
        if len(self._depth) < self._stairs.capacity:
            shape = self._stairs.capacity, self._stairs.slots
            self._depth, self._life, self._token = (np.zeros(shape, dtype=int) for _ in range(3))
        self._depth[:] = 0
        at = chunks.sequence, slot
        self._depth[at], self._life[at], self._token[at] = chunks.depth, life, tokens

    def after(self, sequences: Ints, tokens: Ints) -> dict[int, tuple[list[int], list[int]]]:
        """Further tokens, and their exit depths, of those of `sequences` [S] that have some; they
        have just got `tokens` [S]. To be asked once."""
        stairs = self._stairs
        found: dict[int, tuple[list[int], list[int]]] = {}
        known = sequences < len(self._depth)  # the others came after the last call
        sequences, tokens = sequences[known], tokens[known]
        for slot in range(1, stairs.slots):
            depth = self._depth[sequences, slot]
            now = slot - stairs.tentative[sequences]  # it may have gone on since
            goes = (depth > 0) & (self._life[sequences, slot] == stairs.life[sequences])
            goes &= (now <= stairs.ahead[sequences]) & ~stairs.failed[sequences]
            goes &= stairs.exit_depths[sequences, now] == depth
            began = stairs.guesses[sequences, now] == tokens
            goes &= stairs.right_guess(sequences, began, slot - 1)
            if not goes.any():
                break
            sequences, depth = sequences[goes], depth[goes]
            tokens = self._token[sequences, slot]
            for index, token, exit_depth in zip(
                sequences.tolist(), tokens.tolist(), depth.tolist(), strict=True
            ):
                of_it = found.setdefault(index, ([], []))
                of_it[0].append(token)
                of_it[1].append(exit_depth)
        self._depth[:] = 0
        self._given += [depth for _, depths in found.values() for depth in depths]
        return found

    def take_given(self) -> Ints:
        """The exit depths of all further tokens since this was asked last."""
        given, self._given = self._given, []
        return np.array(given, dtype=np.int64)
