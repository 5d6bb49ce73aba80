"""The running sequences of a worker, and a step over them. Model runners talk to this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_loopus.modeling.exit_rule import ExitRule
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.messages.blocks import BlockOffer
from vllm_loopus.serving.messages.costs import StepCosts
from vllm_loopus.serving.messages.progress import LoopProgress
from vllm_loopus.serving.messages.step_input import NewSequence, StepInput
from vllm_loopus.serving.step.quorum import Quorum
from vllm_loopus.serving.step.run import StepReport, run_step
from vllm_loopus.serving.step.staircase import Chunk, LoopedSequence
from vllm_loopus.serving.worker.block_tables import BlockTables
from vllm_loopus.serving.worker.executor import Decoded, PagedExecutor


@dataclass
class _Running:
    sequence: LoopedSequence
    tokens: list[int]


class RunningSequences:
    """Sequences by request id: their tokens, block tables and staircases."""

    def __init__(
        self,
        executor: PagedExecutor,
        tables: BlockTables,
        quorum: Quorum,
        rule: ExitRule,
        max_depth: int,
        row_budget: int,
        options: EngineOptions,
    ) -> None:
        self.quorum = quorum
        self._rule = rule
        self._executor = executor
        self._tables = tables
        self._max_depth = max_depth
        self._row_budget = row_budget
        self._options = options
        self._running: dict[str, _Running] = {}

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
        request_id = new.request_id
        self.remove(request_id)
        found, decoded = self._tables.add(request_id, new.block_ids, new.cached)
        planes = self._options.planes(new.knobs.max_loops, self._max_depth)
        self._running[request_id] = _Running(
            LoopedSequence(
                request_id,
                new.knobs,
                planes,
                prefill_end=len(new.tokens),
                cached=found,
                # A prompt to be scored goes through the decoder from its first position.
                decoded=None if new.scores_prompt else decoded,
                last_exited=self._options.last_exited,
                num_generated=new.num_generated,
                full_prefill=self._options.full_prefill,
                predetermined=[self._predetermined(new.knobs, d) for d in range(1, planes + 1)],
                carry=self._rule.first_carry,
            ),
            list(new.tokens),
        )

    def _predetermined(self, knobs: RequestKnobs, depth: int) -> bool | None:
        return self._rule.predetermined(
            depth,
            exit_threshold=knobs.exit_threshold,
            min_loops=knobs.min_loops,
            max_loops=knobs.max_loops,
        )

    def grow(self, request_id: str, block_ids: Sequence[int]) -> None:
        """The sequence got more blocks of depth 1."""
        self._tables.append(request_id, block_ids)

    def remove(self, request_id: str) -> None:
        """The sequence ended, was aborted or preempted; unknown ones are ignored."""
        if self._running.pop(request_id, None) is not None:
            self._tables.remove(request_id)

    def sampled(self, request_id: str, token: int) -> None:
        """The sequence got its next token."""
        self._running[request_id].tokens.append(token)

    def position(self, request_id: str) -> int:
        """The newest position of a sequence."""
        return self._running[request_id].sequence.done[0] - 1

    def num_output_tokens(self, request_id: str) -> int:
        """How many tokens were generated before the one that the sequence is about to get."""
        return self._running[request_id].sequence.num_generated - 1

    def step(
        self,
        scheduled: Mapping[str, int],
        offer: BlockOffer,
        costs: StepCosts | None = None,
    ) -> tuple[Decoded, LoopProgress]:
        """Runs a step over the scheduled requests. `scheduled`: how many new positions each may
        start. A sequence in flight continues with its positions, whatever the number."""
        self._tables.begin_step(offer)
        new_chunks: list[Chunk] = []
        tokens: list[int] = []
        for request_id, count in scheduled.items():
            running = self._running[request_id]
            sequence = running.sequence
            if sequence.in_flight:
                continue
            start = sequence.done[0]
            end = start + count
            sequence.begin(count, wants_token=end == len(running.tokens))
            new_chunks.append(Chunk(sequence, 0, start, end))
            tokens += running.tokens[start:end]
        self._executor.begin_step(tokens)
        sequences = [self._running[request_id].sequence for request_id in scheduled]
        report = run_step(
            sequences, self._row_budget, self.quorum, self._executor, new_chunks, costs
        )
        return self._executor.decoded, self._progress(sequences, report)

    def _progress(self, sequences: list[LoopedSequence], report: StepReport) -> LoopProgress:
        progress = LoopProgress(
            taken=self._tables.taken,
            boundary_rows=report.boundary_rows,
            times=report.times,
            stats=report.stats(),
        )
        for sequence in report.emitted:
            assert sequence.exit_depth is not None
            progress.exit_depths[sequence.request_id] = sequence.exit_depth
        for sequence in sequences:
            name = sequence.request_id
            if sequence.failure is not None:
                progress.failed[name] = sequence.failure
                self._executor.cleanse(name)
                continue
            progress.complete[name] = sequence.done[1:]
            if sequence.in_flight:
                progress.in_flight.add(name)
            if wanted := self._wanted(sequence):
                progress.wanted[name] = wanted
            if name not in progress.exit_depths:
                # In flight: one position has to be scheduled again for the step to continue.
                progress.computed[name] = sequence.done[0] - sequence.in_flight
        progress.stats.nonfinite_requests = len(progress.failed)
        return progress

    def _wanted(self, sequence: LoopedSequence) -> int:
        """How many blocks of deeper planes the sequence certainly needs for its next pass."""
        if chunks := sequence.next_chunks():
            budget, missing = self._row_budget, set()
            for chunk in chunks:
                chunk.end = min(chunk.end, chunk.start + budget)
                budget -= len(chunk)
                if len(chunk):
                    missing.update(self._tables.missing(chunk))
            return len(missing)
        if sequence.in_flight or not sequence.last_exited:
            return 0
        if sequence.done[0] < sequence.prefill_end:
            return 0
        # The next token writes to all planes in its first pass.
        return self._tables.missing_at(sequence, sequence.done[0])
