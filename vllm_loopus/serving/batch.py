"""The running sequences of a worker, and one step over them. Model runners talk to this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.serving.blocks import BlockOffer, TakenBlock
from vllm_loopus.serving.boundary import BoundaryRule, StepCosts
from vllm_loopus.serving.knobs import EngineOptions, RequestKnobs
from vllm_loopus.serving.pages import PageTables
from vllm_loopus.serving.passes import Decoded, PagedExecutor
from vllm_loopus.serving.runner_interface import NewSequence, StepInput
from vllm_loopus.serving.staircase import LoopedSequence, Rows
from vllm_loopus.serving.stats import LoopStats
from vllm_loopus.serving.step import StepReport, run_step


@dataclass
class LoopProgress:
    """What the scheduler learns of a step.

    - `computed`: for each scheduled request that got no token, how many of its positions count as
      computed: the next step continues there.
    - `in_flight`: requests among those with positions that they have begun.
    - `complete`: how many positions have their plane complete, a number a depth; the prefix cache
      may have them.
    - `taken`: blocks that sequences took.
    - `wanted`: of deeper planes, how many blocks a sequence cannot go on without.
    - `exit_depths`: for each request that got a token, the depth at which it left.
    - `passes`, `pass_seconds`, `decoder_rows`: rows and time of each pass, rows of the decoder.
    - `failed`: requests that cannot go on, and why; nothing else is said of them but `taken`.
    - `stats`: what the step adds to the metrics.
    """

    computed: dict[str, int] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    complete: dict[str, list[int]] = field(default_factory=dict)
    taken: dict[str, list[TakenBlock]] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    exit_depths: dict[str, int] = field(default_factory=dict)
    passes: list[int] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    decoder_rows: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stats: LoopStats = field(default_factory=LoopStats)

    @property
    def rows_at_boundary(self) -> int:
        """Rows of decoder and encoder; 0 without a decoder call."""
        return self.decoder_rows and self.decoder_rows + self.stats.encoded_rows


@dataclass
class _Running:
    sequence: LoopedSequence
    tokens: list[int]


class LoopedBatch:
    """Sequences by request id, their tokens, block tables and staircases."""

    def __init__(
        self,
        executor: PagedExecutor,
        tables: PageTables,
        rule: BoundaryRule,
        halting: HaltingRule,
        max_depth: int,
        row_budget: int,
        options: EngineOptions,
    ) -> None:
        self.rule = rule
        self._halting = halting
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
        """Brings the batch up to date with the scheduler."""
        for request_id in step.left:
            self.remove(request_id)
        for new in step.new:
            self.add(new)
        for request_id, block_ids in step.grown.items():
            self.grow(request_id, block_ids)

    def add(self, new: NewSequence) -> None:
        """A new sequence, or a preempted one that comes back with all its tokens so far."""
        request_id = new.request_id
        self.remove(request_id)
        found, decoded = self._tables.add(request_id, new.block_ids, new.cached)
        if new.wants_prompt:
            self._executor.want_prompt(request_id)
        planes = self._options.planes(new.knobs.max_loops, self._max_depth)
        self._running[request_id] = _Running(
            LoopedSequence(
                request_id,
                new.knobs,
                planes,
                prefill_end=len(new.tokens),
                cached=found,
                decoded=None if new.wants_prompt else decoded,
                takes_over=self._options.takes_over,
                num_generated=new.num_generated,
                full_prefill=self._options.full_prefill,
                foregone=[self._foregone(new.knobs, depth) for depth in range(1, planes + 1)],
            ),
            list(new.tokens),
        )

    def _foregone(self, knobs: RequestKnobs, depth: int) -> bool | None:
        return self._halting.foregone(
            depth,
            exit_threshold=knobs.exit_threshold,
            min_loops=knobs.min_loops,
            max_loops=knobs.max_loops,
        )

    def grow(self, request_id: str, block_ids: Sequence[int]) -> None:
        """The sequence got more blocks of depth 1."""
        self._tables.append(request_id, block_ids)

    def remove(self, request_id: str) -> None:
        """The sequence finished, was aborted or preempted; unknown ones are ignored."""
        if self._running.pop(request_id, None) is not None:
            self._tables.remove(request_id)
            self._executor.forget(request_id)

    def sampled(self, request_id: str, token: int) -> None:
        """The sequence got its next token."""
        self._running[request_id].tokens.append(token)

    def position(self, request_id: str) -> int:
        """The newest position of a sequence."""
        return self._running[request_id].sequence.done[0] - 1

    def num_output_tokens(self, request_id: str) -> int:
        """Tokens generated before the one that the sequence is about to get."""
        return self._running[request_id].sequence.num_generated - 1

    def step(
        self,
        scheduled: Mapping[str, int],
        offer: BlockOffer,
        costs: StepCosts | None = None,
    ) -> tuple[Decoded, LoopProgress]:
        """Runs a step over the scheduled requests; `scheduled` gives how many new positions each
        may begin. A sequence in flight goes on with what it has begun, whatever the number."""
        self._tables.begin_step(offer)
        new_rows: list[Rows] = []
        tokens: list[int] = []
        for request_id, count in scheduled.items():
            running = self._running[request_id]
            sequence = running.sequence
            if sequence.in_flight:
                continue
            start = sequence.done[0]
            end = start + count
            sequence.begin(count, wants_token=end == len(running.tokens))
            new_rows.append(Rows(sequence, 0, start, end))
            tokens += running.tokens[start:end]
        self._executor.begin_step(tokens)
        sequences = [self._running[request_id].sequence for request_id in scheduled]
        report = run_step(sequences, self._row_budget, self.rule, self._executor, new_rows, costs)
        return self._executor.decoded, self._progress(sequences, report)

    def _progress(self, sequences: list[LoopedSequence], report: StepReport) -> LoopProgress:
        progress = LoopProgress(
            passes=report.passes,
            pass_seconds=report.pass_seconds,
            decoder_rows=report.decoder_rows,
            taken=self._tables.taken,
            stats=LoopStats.of_step(report),
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
                # In flight: one position has to be scheduled again for the step to go on.
                progress.computed[name] = sequence.done[0] - sequence.in_flight
        progress.stats.nonfinite_requests = len(progress.failed)
        return progress

    def _wanted(self, sequence: LoopedSequence) -> int:
        """Blocks of deeper planes that the sequence is certain to need for its next pass."""
        if parts := sequence.next_rows():
            budget, missing = self._row_budget, set()
            for rows in parts:
                rows.end = min(rows.end, rows.start + budget)
                budget -= len(rows)
                if len(rows):
                    missing.update(self._tables.missing(rows))
            return len(missing)
        if sequence.in_flight or not sequence.takes_over or sequence.done[0] < sequence.prefill_end:
            return 0
        # The next token writes to all planes in its first pass.
        return self._tables.missing_at(sequence, sequence.done[0])
