"""The running sequences of a worker, and a step over them. Model runners talk to this."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_loopus.modeling.exit_rule import ExitRule
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.messages.blocks import TakenBlock
from vllm_loopus.serving.messages.progress import LoopProgress
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.messages.step_input import NewSequence, StepInput
from vllm_loopus.serving.step.chunks import Chunks, Ints
from vllm_loopus.serving.step.run import StepRunner
from vllm_loopus.serving.step.staircase import Staircases, Start
from vllm_loopus.serving.worker.block_tables import BlockTables
from vllm_loopus.serving.worker.decoded import Decoded, DecodedRows
from vllm_loopus.serving.worker.device_tokens import SampledTokens
from vllm_loopus.serving.worker.executor import PagedExecutor
from vllm_loopus.serving.worker.transfer import to_device


class RunningSequences:
    """Sequences by request id: their tokens, block tables and staircases.

    Each has a row of the arrays in `Staircases`, `BlockTables` and here. A sequence that generates
    goes on by itself: its next position begins once its token is sampled, if there is a block of
    depth 1 for it. The scheduler is only needed for prompts, blocks and ends.
    """

    def __init__(
        self,
        executor: PagedExecutor,
        stairs: Staircases,
        tables: BlockTables,
        runner: StepRunner,
        rule: ExitRule,
        row_budget: int,
        max_model_len: int,
        options: EngineOptions,
    ) -> None:
        self.stairs = stairs
        self.runner = runner
        self._rule = rule
        self._executor = executor
        self._tables = tables
        self._row_budget = row_budget
        self._max_model_len = max_model_len
        self._options = options
        self._index: dict[str, int] = {}
        self._names: list[str] = [""] * stairs.capacity
        self._tokens: list[list[int]] = [[] for _ in range(stairs.capacity)]
        self._known = np.zeros(stairs.capacity, dtype=np.int64)  # number of tokens
        self._newest = np.zeros(stairs.capacity, dtype=np.int32)  # the last token
        self._limit = np.zeros(stairs.capacity, dtype=np.int64)  # it ends with so many tokens
        self._published = np.zeros((stairs.capacity, stairs.planes), dtype=np.int64)  # blocks
        self._unused = list(range(stairs.capacity))[::-1]
        self._scored: dict[int, str] = {}
        self._active = np.zeros(0, dtype=np.int64)  # of this step
        self._everyone = False
        self._further: dict[str, list[int]] = {}  # exit depths of further tokens of this step
        self._stalled = 0  # sequences that could not begin, for lack of blocks
        executor.texts = self
        runner.successors = lambda sequences: self._successors(sequences, self._known + 1)
        if runner.guesses is not None:
            runner.guesses.room_ahead = self._room_ahead

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._index

    def capture(self) -> int:
        """Captures the graphs of the loop's regions. Returns the bytes that they take."""
        return self._executor.capture()

    def receive(self, step: StepInput) -> None:
        """Brings the sequences up to date with the scheduler."""
        for request_id in step.finished:
            self.remove(request_id)
        for new in step.new:
            self.add(new)
        for request_id, block_ids in step.grown.items():
            self.grow(request_id, block_ids)

    def add(self, new: NewSequence) -> None:
        """A new sequence, or a preempted one that resumes with all its tokens so far."""
        self.remove(new.request_id)
        if not self._unused:
            self._reserve(2 * self.stairs.capacity)
        self._index[new.request_id] = index = self._unused.pop()
        found, decoded = self._tables.add(index, new.block_ids, new.cached)
        deepest = self._options.deepest(new.knobs.max_loops, self.stairs.num_depths)
        start = Start(
            new.knobs,
            deepest,
            prefill_end=len(new.tokens),
            predetermined=[self._predetermined(new.knobs, d) for d in range(1, deepest + 1)],
            cached=found,
            # A prompt to be scored goes through the decoder from its first position.
            decoded=None if new.scores_prompt else decoded,
            num_generated=new.num_generated,
            scored=new.scores_prompt,
        )
        self.stairs.add(index, start)
        self._executor.add(index, new.knobs, len(new.tokens) if new.scores_prompt else 0)
        # A prompt that is scored has its chunks in the decoder alone.
        guesses = new.knobs.speculate and not new.scores_prompt
        self.stairs.lookahead[index] = self._options.lookahead if guesses else 0
        self.stairs.greedy[index] = new.greedy
        if self.runner.guesses is not None:
            self.runner.guesses.waves.plan.add(index)
        self._names[index], self._tokens[index] = new.request_id, list(new.tokens)
        self._known[index], self._newest[index] = len(new.tokens), new.tokens[-1]
        most = self._max_model_len if new.max_tokens is None else new.max_tokens
        prompt = len(new.tokens) - new.num_generated
        self._limit[index] = min(prompt + most, self._max_model_len)
        done = self.stairs.done[index, 1 : self.stairs.planes + 1]
        self._published[index] = done // self._tables.block_size
        if new.scores_prompt:
            self._scored[index] = new.request_id

    def _reserve(self, rows: int) -> None:
        """Makes room for as many sequences."""
        before = self.stairs.capacity
        self.stairs.reserve(rows)
        self._tables.reserve(rows)
        self._names += [""] * (rows - before)
        self._tokens += [[] for _ in range(rows - before)]
        for name in ("_known", "_newest", "_limit", "_published"):
            old = getattr(self, name)
            grown = np.zeros((rows - before, *old.shape[1:]), dtype=old.dtype)
            setattr(self, name, np.concatenate([old, grown]))
        self._unused += range(rows - 1, before - 1, -1)

    def _predetermined(self, knobs: RequestKnobs, depth: int) -> bool | None:
        return self._rule.predetermined(
            depth,
            exit_threshold=knobs.exit_threshold,
            min_loops=knobs.min_loops,
            max_loops=knobs.max_loops,
        )

    def grow(self, request_id: str, block_ids: Sequence[int]) -> None:
        """The sequence got more blocks of depth 1."""
        self._tables.append(self._index[request_id], block_ids)

    def remove(self, request_id: str) -> None:
        """The sequence ended, was aborted or preempted; unknown ones are ignored."""
        if (index := self._index.pop(request_id, None)) is not None:
            if call := self.runner.unread(index):
                self._tables.suspect(index, call)
            self.stairs.remove(index)
            self._scored.pop(index, None)
            self._unused.append(index)

    def names(self, sequences: Ints) -> list[str]:
        """The request ids of sequences."""
        return [self._names[index] for index in sequences.tolist()]

    def index(self, request_id: str) -> int:
        """The row of a sequence."""
        return self._index[request_id]

    def tokens(self, request_id: str) -> list[int]:
        """All known tokens of a sequence."""
        return self._tokens[self._index[request_id]]

    def sampled(self, request_id: str, token: int) -> None:
        """The sequence got its next token."""
        index = self._index[request_id]
        self._tokens[index].append(token)
        self._known[index] += 1
        self._newest[index] = token

    def further(self, request_ids: Sequence[str], tokens: list[list[int]]) -> None:
        """Appends to the `tokens` [n] that requests got, none or one each, those that came along
        with it. Called after `finish`, before `sampled`."""
        if self.runner.guesses is None:
            return
        got = {self._index[n]: some for n, some in zip(request_ids, tokens, strict=True) if some}
        sequences = np.array([*got], dtype=np.int64)
        newest = np.array([some[0] for some in got.values()], dtype=np.int64)
        found = self.runner.guesses.further.after(sequences, newest)
        for index, (more, depths) in found.items():
            got[index] += more
            self._further[self._names[index]] = depths

    def wanting(self) -> Ints:
        """The sequences of this step that want a token."""
        stairs = self.stairs
        return self._active[stairs.in_flight[self._active] & stairs.wants_token[self._active]]

    def positions(self, request_ids: Sequence[str]) -> tuple[list[int], list[int]]:
        """The newest position of each of these sequences, and how many tokens they had generated
        before the one that they are about to get."""
        index = np.array([self._index[name] for name in request_ids], dtype=np.int64)
        generated = self.stairs.num_generated[index] - ~self.stairs.in_flight[index]
        return (self.stairs.done[index, 0] - 1).tolist(), generated.tolist()

    def begin_step(self, step: StepInput) -> None:
        """Begins what is scheduled, and the next positions of sequences that go on by themselves. A
        sequence in flight continues with its positions, whatever is scheduled."""
        promised = {
            self._index[name]: count
            for name, count in step.offer.promised.items()
            if name in self._index
        }
        self._tables.begin_step(step.offer.free, promised)
        stairs, self._everyone, self._stalled = self.stairs, step.everyone, 0
        self.runner.thrifty = not step.everyone
        scheduled = np.array([self._index[name] for name in step.scheduled], dtype=np.int64)
        counts = np.array(list(step.scheduled.values()), dtype=np.int64)
        start = stairs.done[scheduled, 0]
        prompts = ~stairs.in_flight[scheduled] & ~stairs.failed[scheduled]
        prompts &= start < stairs.prefill_end[scheduled]
        if prompts.any():
            index, counts = scheduled[prompts], counts[prompts]
            wants = start[prompts] + counts == self._known[index]
            stairs.begin(index, counts, wants)
        candidates = np.flatnonzero(stairs.present) if step.everyone else scheduled
        self._active = active = candidates[~stairs.failed[candidates]]
        self._compare_guesses()
        idle = active[~stairs.in_flight[active]]
        self._go_on(idle[self._known[idle] == stairs.done[idle, 0] + 1], self._known)

    def _room_ahead(self, sequences: Ints) -> Ints:
        """How many positions after the newest certain ones may begin [S]: they have a block of
        depth 1, and their requests may generate so many tokens."""
        end = self.stairs.done[sequences, 0]
        tokens = self._limit[sequences] - end - 1
        return np.minimum(tokens, self._tables.positions_at_first(sequences) - end)

    def _compare_guesses(self) -> None:
        """Where a token has been sampled since, the first guess is right, and its position goes on,
        or wrong, and all that followed from it is forgotten."""
        stairs, active, guesses = self.stairs, self._active, self.runner.guesses
        if guesses is None:
            return
        while True:  # once for each token that a sequence got, several at most
            waits = ~stairs.in_flight[active] & (stairs.ahead[active] > 0)
            index = active[stairs.tentative[active] | waits]
            certain = stairs.certain(index)
            index, certain = (those[self._known[index] > certain] for those in (index, certain))
            if not len(index):
                return
            token = self._newest[index]
            for at in np.flatnonzero(self._known[index] > certain + 1).tolist():
                token[at] = self._tokens[index[at]][certain[at]]
            slot = np.where(stairs.tentative[index], 0, 1)
            right = stairs.right_guess(index, stairs.guesses[index, slot] == token)
            right &= certain + 1 < self._limit[index]
            guesses.confirm(index[right], self.runner.quorum)
            wrong = index[~right]
            guesses.waves.reject(wrong)
            self._tables.forget(wrong, stairs.done[wrong, 0], stairs.slots)
            # Those whose next token is known, too.
            stairs.finish(index[right & (self._known[index] > certain + 1)])

    def _successors(self, sequences: Ints, known: Ints) -> Chunks:
        """The next positions, at depth 1, of those of `sequences` that generate, have not ended
        with `known` [S] tokens, and have a block of depth 1."""
        stairs = self.stairs
        position = stairs.done[sequences, 0]
        may = (position >= stairs.prefill_end[sequences]) & ~stairs.failed[sequences]
        may &= (known[sequences] < self._limit[sequences]) & (stairs.ahead[sequences] == 0)
        may &= self._tables.room_at_first(sequences, position)
        going, position = sequences[may], position[may]
        depth, newest = np.ones_like(going), np.ones(len(going), dtype=bool)
        return Chunks(going, depth, position, position + 1, newest)

    def _go_on(self, sequences: Ints, known: Ints) -> Chunks:
        """Begins the next positions of those of `sequences`, none in flight, that go on and have
        the blocks. Returns what has begun."""
        stairs = self.stairs
        going = self._successors(sequences, known).sequence
        if stairs.last_exited and len(going):
            # A generated position takes its blocks at all depths with the first pass.
            deepest = stairs.max_depth[going]
            missing = self._tables.missing_deeper(going, stairs.done[going, 0], deepest)
            affordable = self._tables.affordable(going, missing)
            self._stalled += int(np.count_nonzero(~affordable))
            going = going[affordable]
        going = going[: self._room()]
        if not len(going):
            return Chunks.none()
        begun = stairs.begin(going, 1, True)
        if stairs.last_exited:
            self._executor.make_room_next(begun.at(1))  # now: others may take what is left
        return begun

    def _room(self) -> int:
        """How many more positions may begin before the next pass."""
        stairs, active = self.stairs, self._active
        new = active[stairs.in_flight[active] & (stairs.depth[active] == 0)]
        return max(self._row_budget - int((stairs.done[new, 0] - stairs.begun[new]).sum()), 0)

    def step(self, step: StepInput, waits: bool = True, foresees: bool = False) -> Decoded:
        """Runs a step that has begun: passes, and the decoder. Returns what can be sampled.

        `waits`: for the decoder, so that this is only of sequences whose states are finite.
        Otherwise `finish` waits. `foresees`: see `StepRunner.run`; then these are sequences that
        may have exited, and `go_on` finds out.
        """
        self._executor.begin_step()
        self.runner.run(self._active, step.costs, foresees, step.seconds)
        if waits:
            self._settle()
        decoded = self._executor.decoded
        return Decoded(decoded.hidden, self.names(decoded.sequences))

    def go_on(self, token_ids: torch.Tensor) -> None:
        """Launches the next pass: of what is in flight, and of the next positions after the tokens
        `token_ids` [n] of the decoded sequences, which are still on the device."""
        decoded, exited = self._executor.decoded.sequences, self.runner.resolve()
        exited = self._go_on_guessing(exited)
        prepared = self.runner.may_begin()
        if prepared is None:
            begun = self._go_on(exited, self._known + 1)
        else:
            ready = np.zeros(self.stairs.capacity, dtype=bool)
            ready[prepared] = True
            going = exited[ready[exited]][: self._room()]
            begun = self.stairs.begin(going, 1, True) if len(going) else Chunks.none()
        going = begun.sequence
        if len(going) < len(decoded):
            place = np.empty(self.stairs.capacity, dtype=np.int64)
            place[decoded] = np.arange(len(decoded))
            token_ids = token_ids.index_select(0, to_device(place[going], token_ids.device))
        self._executor.sampled = SampledTokens(going, token_ids) if len(going) else None
        self.runner.go_on(self._active, begun)

    def _go_on_guessing(self, exited: Ints) -> Ints:
        """Those of `exited` that have guessed their tokens go on as if they were right. Returns the
        others."""
        if (guesses := self.runner.guesses) is None:
            return exited
        guessed = self.stairs.ahead[exited] > 0
        goes_on = guessed & (self._known[exited] + 1 < self._limit[exited])
        guesses.waves.go_on(exited[goes_on])
        return exited[~guessed]

    def _settle(self) -> None:
        """Waits for the decoder: sequences whose states are not finite have failed."""
        stairs = self.stairs
        self._tables.mark_decoded(self.runner.settle_decoder())
        if len(spoiled := np.flatnonzero(stairs.spoiled)):
            self._tables.forget(spoiled, stairs.done[spoiled, 0], stairs.slots)
            stairs.spoiled[spoiled] = False
        decoded = self._executor.decoded
        if (failed := self.stairs.failed[decoded.sequences]).any():
            assert decoded.hidden is not None
            kept = torch.from_numpy(np.flatnonzero(~failed)).to(decoded.hidden.device)
            hidden = decoded.hidden.index_select(0, kept) if len(kept) else None
            self._executor.decoded = DecodedRows(hidden, decoded.sequences[~failed])

    def finish(self) -> LoopProgress:
        """Ends the step; its tokens have been sampled or are about to be."""
        self._settle()
        report, stairs, active = self.runner.report, self.stairs, self._active
        report.times.gap, report.times.host = self.runner.clock.gap, self.runner.clock.host
        self._further = {}
        progress = LoopProgress(
            further=self._further,
            boundary_rows=report.boundary_rows,
            stalled=report.stalled + self._stalled,
            times=report.times,
            stats=self._stats(),
        )
        for taken in self._tables.taken:
            of_block = zip(
                self.names(taken.sequence),
                *_lists(taken.depth, taken.column, taken.block),
                strict=True,
            )
            for name, *place in of_block:
                progress.taken.setdefault(name, []).append(TakenBlock(*place))
        names = self.names(report.emitted)
        progress.exit_depths = dict(zip(names, report.exit_depths.tolist(), strict=True))
        failed = active[stairs.failed[active]]
        for index in failed.tolist():
            progress.failed[self._names[index]] = stairs.reasons[index]
            self._executor.cleanse(index)
        active = active[~stairs.failed[active]]
        flying = stairs.in_flight[active]
        progress.in_flight = set(self.names(active[flying]))
        self._report_complete(active, progress)
        if progress.stalled or not self._everyone:
            self._report_wanted(active, progress)
        idle = active[~flying]
        computed = dict(zip(self.names(idle), stairs.done[idle, 0].tolist(), strict=True))
        progress.computed = {name: computed[name] for name in computed.keys() - set(names)}
        progress.stats.nonfinite_requests = len(progress.failed)
        return progress

    def _stats(self) -> LoopStats:
        stats = self.runner.report.stats()
        if self.runner.guesses is not None:
            counts = self.runner.guesses.waves.counted()
            stats.guesses, stats.wasted_rows = counts.made, counts.wasted
            stats.confirmed_guesses = counts.confirmed
            stats.rejected_guesses = counts.rejected
        return stats

    def _report_complete(self, active: Ints, progress: LoopProgress) -> None:
        """The sequences with blocks that are newly complete at some depth."""
        # A guess is never published.
        settled = self.stairs.settled[active, 1 : self.stairs.planes + 1]
        settled = np.minimum(settled, self.stairs.certain(active)[:, None])
        blocks = settled // self._tables.block_size
        newly = (blocks > self._published[active]).any(axis=1)
        if newly.any():
            index = active[newly]
            self._published[index] = blocks[newly]
            complete = settled[newly].tolist()
            progress.complete = dict(zip(self.names(index), complete, strict=True))

    def _report_wanted(self, active: Ints, progress: LoopProgress) -> None:
        """How many blocks of deeper planes sequences certainly need for their next passes."""
        stairs = self.stairs
        chunks = stairs.next_chunks(active)
        wanted: dict[int, int] = {}
        if len(chunks):
            chunks = chunks.cut(np.minimum(chunks.sizes, self._row_budget))
            missing = self._tables.missing(chunks, self._executor.deepest(chunks))
            for index, count in zip(*_lists(chunks.sequence, missing), strict=True):
                wanted[index] = wanted.get(index, 0) + count
        if stairs.last_exited:
            # The next token writes to all planes in its first pass.
            idle = active[~stairs.in_flight[active]]
            idle = idle[stairs.done[idle, 0] >= stairs.prefill_end[idle]]
            missing = self._tables.missing_deeper(
                idle, stairs.done[idle, 0], stairs.max_depth[idle]
            )
            wanted |= dict(zip(*_lists(idle, missing), strict=True))
        progress.wanted = {self._names[index]: count for index, count in wanted.items() if count}

    def token_ids(self, chunks: Chunks) -> NDArray[np.int32]:
        """See `Texts`."""
        sequences = chunks.sequence
        slot = chunks.end - self.stairs.done[sequences, 0]
        guess = self.stairs.guesses[sequences, np.maximum(slot, 0)]
        guessed = (slot > 0) | ((slot == 0) & self.stairs.tentative[sequences])
        known = np.where(guessed, guess, self._newest[sequences]).astype(np.int32)
        plain = (chunks.sizes == 1) & (chunks.end >= self._known[sequences])
        if plain.all():
            return known
        parts = [
            [token] if single else self._tokens[index][start:end]
            for token, single, index, start, end in zip(
                *_lists(known, plain, sequences, chunks.start, chunks.end), strict=True
            )
        ]
        return np.concatenate([np.array(part, dtype=np.int32) for part in parts])

    def scored(self) -> dict[int, str]:
        """See `Texts`."""
        return self._scored


def _lists(*arrays: NDArray[np.generic]) -> list[list[int]]:
    return [array.tolist() for array in arrays]
