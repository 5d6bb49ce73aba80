"""Model and paged memory without a model: `FakeExecutor` is a `StepExecutor` over names.

K/V and states are names of what they should hold, a depth and a token prefix. It fails when a row
reads what is not there.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch

from vllm_loopus.serving.step.chunks import Chunks
from vllm_loopus.serving.step.staircase import Staircases
from vllm_loopus.serving.step.wave import NOT_READ
from vllm_loopus.serving.worker.block_tables import BlockTables
from vllm_loopus.serving.worker.decoded import DecodedRows

BLOCK = 4
VOCABULARY = 50
POISON = 10**6  # a token of a prompt: states are NaN from its position on


def digest(*parts: Any) -> int:
    return crc32(repr(parts).encode())


def next_token(tokens: Iterable[int]) -> int:
    """What the fake model says after `tokens`."""
    return digest("token", tuple(tokens)) % VOCABULARY


def wanted_depth(tokens: Iterable[int], max_depth: int) -> int:
    """Where the fake model's head lets the last of `tokens` exit, budgets aside."""
    return 1 + digest("depth", tuple(tokens)) % max_depth


def answer(
    prompt: list[int],
    count: int,
    max_depth: int,
    max_loops: int,
    min_loops: int = 1,
    interval: int = 1,
) -> tuple[list[int], list[int]]:
    """Tokens and exit depths of a request that runs alone."""
    tokens, depths = list(prompt), []
    for _ in range(count):
        wanted = max(wanted_depth(tokens, max_depth), min_loops)
        depths.append(min(-(-wanted // interval) * interval, max_loops))
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :], depths


class Row(NamedTuple):
    """A chunk; its positions are rows."""

    sequence: int
    depth: int
    start: int
    end: int
    newest: bool
    copied: bool  # to deeper depths when it exits


def guess(prefix: tuple[int, ...]) -> int:
    """The next token, or in every fourth case another one."""
    return (next_token(prefix) + (digest("guess", prefix) % 4 == 0)) % VOCABULARY


class FakeReading:
    """What a call of `FakeExecutor` decides. Sequences with a poisoned token fail when it is
    read."""

    def __init__(self, executor: "FakeExecutor", exits: list[bool], copied: list[Row]) -> None:
        self.executor, self.exits, self.copied = executor, np.array(exits, dtype=bool), copied
        self.watched, executor.watched = executor.watched, []
        self.likely = np.zeros(0, dtype=np.int64)

    def wait(self) -> Any:
        stairs = self.executor.stairs
        for row, life in self.watched:
            known = (
                self.executor.prefix(row.sequence, row.end - 1)
                if life == stairs.life[row.sequence]
                else ()
            )
            if POISON in known:
                stairs.fail_at(row.sequence, row.end, "NaN")
        return self.exits

    def tokens(self) -> Any:
        return self.likely

    def complete(self, leaving: Any) -> None:
        for row, leaves in zip(self.copied, leaving, strict=True):
            if leaves and self.executor.copies(row):
                for kind in ("state", "reasoning"):
                    deeper = range(row.depth + 1, self.executor.last_plane(row.sequence) + 1)
                    self.executor.copy(kind, row, deeper)


def rows_of(stairs: Staircases, chunks: Chunks) -> list[Row]:
    copied = stairs.copies_on_exit(chunks.sequence) & chunks.newest
    arrays = chunks.sequence, chunks.depth, chunks.start, chunks.end, chunks.newest, copied
    return [Row(*values) for values in zip(*(array.tolist() for array in arrays), strict=True)]


class FakeExecutor:
    """`StepExecutor` over names. `batch` is to be set to the batch it works for."""

    asynchronous = False

    def __init__(
        self, stairs: Staircases, tables: BlockTables, budget: int, interval: int = 1
    ) -> None:
        self.stairs, self.tables, self.budget = stairs, tables, budget
        self.interval = interval
        self.batch: Any = None
        self.memory: dict[tuple[str, int], tuple[int, tuple[int, ...]]] = {}
        self.decoded = DecodedRows()
        self.sampled: Any = None
        self.on_device: dict[tuple[int, int], int] = {}  # life, sequence -> its newest token
        self.likely: dict[tuple[int, int, int], int] = {}  # life, sequence, position: its guess
        self.encoded: list[tuple[int, int]] = []
        self.watched: list[tuple[Row, int]] = []
        self.passes = 0
        self.longest_run = 0  # passes without a decision in between

    def add(self, index: int, knobs: Any, scored: int) -> None:
        pass

    def begin_step(self) -> None:
        self.decoded = DecodedRows()

    def deepest(self, chunks: Chunks) -> Any:
        copied = chunks.newest & self.stairs.copies_on_exit(chunks.sequence)
        return np.where(copied, self.stairs.max_depth[chunks.sequence], chunks.depth)

    def make_room(self, chunks: Chunks) -> Any:
        return self.wiping(lambda: self.tables.make_room(chunks, self.deepest(chunks)))

    def make_room_next(self, chunks: Chunks) -> Any:
        deepest = self.stairs.max_depth[chunks.sequence] if self.stairs.last_exited else None
        return self.wiping(lambda: self.tables.make_room(chunks, deepest))

    def make_room_deeper(self, chunks: Chunks, passes: int) -> int:
        return self.wiping(lambda: self.tables.make_room_deeper(chunks, passes))

    def wiping(self, take: Callable[[], Any]) -> Any:
        """A block that is given out again holds nothing."""
        before = len(self.tables.taken)
        result = take()
        for taken in self.tables.taken[before:]:
            for block in taken.block.tolist():
                self.wipe(block)
        return result

    def wipe(self, block: int) -> None:
        for kind in ("state", "reasoning", "decoder"):
            for slot in range(block * BLOCK, (block + 1) * BLOCK):
                self.memory.pop((kind, slot), None)

    def prefix(self, sequence: int, position: int) -> tuple[int, ...]:
        tokens = list(self.batch._tokens[sequence])
        certain = int(self.stairs.certain(np.array([sequence]))[0])
        if position >= certain:
            first = int(not self.stairs.tentative[sequence])
            guesses = self.stairs.guesses[sequence, first : first + position - certain + 1].tolist()
            life = int(self.stairs.life[sequence])
            for at, token in enumerate(guesses):
                if token == NOT_READ:
                    guesses[at] = self.likely[life, sequence, certain + at]
            return (*tokens[:certain], *guesses)
        if position >= len(tokens):  # its token has been sampled and not been read
            tokens.append(self.on_device[int(self.stairs.life[sequence]), sequence])
        assert position < len(tokens)
        return tuple(tokens[: position + 1])

    def last_plane(self, sequence: int) -> int:
        return min(int(self.stairs.max_depth[sequence]), self.stairs.planes)

    def place(self, kind: str, sequence: int, depth: int, position: int) -> Any:
        """Where a state or K/V lies: beyond the last plane, states of positions in flight."""
        if kind == "state" and depth > self.stairs.planes:
            return sequence, position % self.stairs.slots, depth
        return self.slot(sequence, depth, position)

    def slot(self, sequence: int, depth: int, position: int) -> int:
        depth = min(depth, self.stairs.planes)
        block = int(self.tables._tables[sequence, depth - 1, position // BLOCK])
        assert block, "block 0 is vLLM's null block"
        return block * BLOCK + position % BLOCK

    def write(self, kind: str, sequence: int, depth: int, position: int) -> None:
        value = (depth, self.prefix(sequence, position))
        if kind == "state" or depth <= self.stairs.planes:
            self.memory[kind, self.place(kind, sequence, depth, position)] = value

    def read(self, kind: str, sequence: int, depth: int, position: int) -> None:
        found = self.memory.get((kind, self.place(kind, sequence, depth, position)))
        depth = depth if kind == "state" else min(depth, self.stairs.planes)
        assert found is not None, (kind, depth, position)
        # In `last_exited` a generated position may hold what it had where it exited.
        assert found[1] == self.prefix(sequence, position), (kind, depth, position, found)
        assert found[0] == depth or self.stairs.last_exited, (kind, depth, position, found)

    def watch(self, rows: list[Row]) -> None:
        self.watched += [(row, int(self.stairs.life[row.sequence])) for row in rows]

    def prepare_pass(self, chunks: Chunks) -> Any:
        return SimpleNamespace(chunks=chunks)

    prepare_decoder = prepare_encoder = prepare_pass

    def encode(self, chunks: Chunks, prepared: Any = None) -> None:
        assert chunks.rows <= self.budget
        if self.sampled is not None:
            for index, token in zip(
                self.sampled.sequences.tolist(), self.sampled.ids.tolist(), strict=True
            ):
                self.on_device[int(self.stairs.life[index]), index] = token
            self.sampled = None
        rows = rows_of(self.stairs, chunks)
        self.encoded = [(r.sequence, p) for r in rows for p in range(r.start, r.end)]
        given = self.batch.token_ids(chunks)
        for (sequence, position), token in zip(self.encoded, given.tolist(), strict=True):
            if position % BLOCK == 0:
                self.wipe(self.slot(sequence, 1, position) // BLOCK)
            if position < len(self.batch._tokens[sequence]):
                assert token == self.batch._tokens[sequence][position]

    def run_passes(
        self, chunks: Chunks, passes: int, decides: Callable[[], Any], prepared: Any = None
    ) -> FakeReading | None:
        deciding = decides()
        for deeper in range(passes - 1, -1, -1):  # passes still to come
            rows = rows_of(self.stairs, chunks.deeper(-deeper))
            self.run_pass(rows)
            exits = [self.exits(rows[index]) for index in deciding]
            assert not (deeper and any(exits)), "no token exits before the last pass"
        self.longest_run = max(self.longest_run, passes)
        self.watch(rows)
        if not len(deciding):
            return None
        return FakeReading(self, exits, [rows[index] for index in deciding])

    def run_pass(self, rows: list[Row]) -> None:
        assert 0 < sum(row.end - row.start for row in rows) <= self.budget
        self.passes += 1
        fresh = [(r.sequence, p) for r in rows if r.depth == 1 for p in range(r.start, r.end)]
        if fresh:
            assert fresh == self.encoded, "h^0 is kept for the first pass alone"
            self.encoded = []
        for row in rows:
            for position in range(row.start, row.end):
                if row.depth > 1:
                    self.read("state", row.sequence, row.depth - 1, position)
        for row in rows:
            for position in range(row.start, row.end):
                self.write("state", row.sequence, row.depth, position)
                self.write("reasoning", row.sequence, row.depth, position)
        for row in rows:
            for position in range(row.end):
                self.read("reasoning", row.sequence, row.depth, position)

    def exits(self, row: Row) -> bool:
        """Whether the exit rule lets the newest position exit."""
        prefix = self.prefix(row.sequence, row.end - 1)
        if row.depth >= self.stairs.max_loops[row.sequence]:
            return True
        if row.depth < self.stairs.min_loops[row.sequence] or row.depth % self.interval:
            return False
        return row.depth >= wanted_depth(prefix, self.stairs.num_depths)

    def likely_token(self, row: Row, prefix: Any) -> int:
        """What the decoder takes for most likely: where the position exits, it is right."""
        return next_token(prefix) if self.exits(row) else guess(prefix)

    def check_states(self) -> FakeReading | None:
        return FakeReading(self, [], []) if self.watched else None

    def must_read(self) -> bool:
        return self.tables.suspects_in_use

    def trust(self, oldest: int) -> None:
        self.tables.trust(oldest)

    def may_chain(self) -> bool:
        return True

    def cleanse(self, index: int) -> None:
        pass

    def copies(self, row: Row) -> bool:
        return row.copied and row.depth < self.last_plane(row.sequence)

    def copy(self, kind: str, row: Row, depths: Iterable[int]) -> None:
        value = self.memory[kind, self.slot(row.sequence, row.depth, row.end - 1)]
        for depth in depths:
            self.memory[kind, self.slot(row.sequence, depth, row.end - 1)] = value

    def decode(
        self,
        chunks: Chunks,
        used: Any = None,
        prepared: Any = None,
        guessing: Any = None,
        beginning: Any = None,
    ) -> FakeReading:
        rows = rows_of(self.stairs, chunks)
        assert 0 < sum(row.end - row.start for row in rows) <= self.budget
        for row in rows:
            for position in range(row.start, row.end):
                self.read("state", row.sequence, row.depth, position)
                self.write("decoder", row.sequence, row.depth, position)
            if row.copied:
                may_exit = np.flatnonzero(self.stairs.may_exit[row.sequence])
                value = row.depth, self.prefix(row.sequence, row.end - 1)
                for depth in np.minimum(may_exit, self.stairs.planes).tolist():
                    self.memory["decoder", self.slot(row.sequence, depth, row.end - 1)] = value
        for row in rows:
            for position in range(row.end):
                self.read("decoder", row.sequence, row.depth, position)
        self.watch(rows)
        chosen = chunks.newest if used is None else chunks.newest & used
        guesses = np.zeros(len(rows), dtype=bool) if guessing is None else guessing
        prefixes = [self.prefix(row.sequence, row.end - 1) for row in rows]
        newest = np.flatnonzero(chosen & ~guesses)
        if len(newest) or guessing is None:
            said = [next_token(prefixes[at]) for at in newest]
            self.decoded = DecodedRows(
                torch.tensor(said).reshape(-1, 1), chunks.sequence[newest].astype(int)
            )
        reading = FakeReading(self, [], [])
        asked = np.flatnonzero(guesses).tolist()
        reading.likely = np.array([self.likely_token(rows[at], prefixes[at]) for at in asked])
        for at, token in zip(asked, reading.likely.tolist(), strict=True):
            if beginning is None or beginning[at]:
                index = int(chunks.sequence[at])
                self.likely[int(self.stairs.life[index]), index, int(chunks.end[at])] = token
        return reading


class EagerQuorum:
    """Has the decoder launched before exits are read, and passes in chains, whatever they cost."""

    def __init__(self, rule: Any, passes: int) -> None:
        self.rule, self.passes = rule, passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def foresees(self, *args: Any) -> bool:
        return True

    def chain(self, *args: Any) -> int:
        return self.passes
