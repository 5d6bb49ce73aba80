"""One engine step of a looped model: encoder, passes at mixed depths, decoder.

Plain control flow over an executor that does the computing; the property tests put a fake one in.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_loopus.serving.boundary import BoundaryRule, StepCosts
from vllm_loopus.serving.staircase import LoopedSequence, Rows


class StepExecutor(Protocol):
    """What a step needs done. Rows of one call may stand at different depths.

    K/V and states of a newest row whose sequence `writes_through` go to all deeper depths as well
    when it leaves, the decoder's K/V to all depths at which a token may leave.
    """

    def make_room(self, rows: Rows) -> int:
        """How many of the rows, from the first, have blocks to be written to; takes new ones."""
        ...

    def encode(self, rows: list[Rows]) -> None:
        """Depth 0: runs the encoder and keeps `h^0` for the pass that follows."""
        ...

    def make_room_below(self, rows: list[Rows], passes: int) -> int:
        """As many of the `passes` from the depths of `rows` on, a depth deeper each, as all rows
        have blocks for; those of the first are there, new ones are taken for the others."""
        ...

    def run_passes(self, rows: list[Rows], passes: int, deciding: list[int]) -> list[bool]:
        """Passes of the reasoning block over the same positions, a depth deeper each; `rows` are at
        the depths of the last. All rows at depth 1 in the first come first, as encoded.

        Returns, for each index in `deciding`, whether the halting rule lets that newest position
        leave after the last; nobody leaves before. Sequences with a state that is not a number
        fail, here, in `decode` or in `settle`.
        """
        ...

    def settle(self) -> None:
        """In a step without a decoder call: whoever has a state that is not a number has failed."""
        ...

    def decode(self, rows: list[Rows]) -> None:
        """Runs the decoder and keeps the hidden states of the newest positions among `rows`.
        Sequences with a state that is not a number fail, of these rows or of passes before."""
        ...


@dataclass
class StepReport:
    """What a step did.

    - `passes`: rows of each pass; `pass_seconds`: how long each took, on average where several ran
      as one.
    - `encoded_rows`: new positions; `catch_up_rows`: rows of passes before them.
    - `wanting`: sequences that wanted a token when the passes ended; `ready`: those of them that
      had left. `waiting`: sequences that had left before a pass, summed over the passes.
    """

    emitted: list[LoopedSequence] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    encoded_rows: int = 0
    catch_up_rows: int = 0
    decoder_rows: int = 0
    waiting: int = 0
    ready: int = 0
    wanting: int = 0


def run_step(
    scheduled: Sequence[LoopedSequence],
    row_budget: int,
    rule: BoundaryRule,
    executor: StepExecutor,
    new_rows: Sequence[Rows] = (),
    costs: StepCosts | None = None,
) -> StepReport:
    """Refines the sequences in flight until the rule ends the passes, then decodes.

    `new_rows` (depth 0) belong to sequences that have just begun; they are at most `row_budget`.
    No pass and no decoder call has more rows than that; when it is short, everybody gets what an
    equal share holds, and the longest in flight what is left over: a long catch-up does not keep
    others from their next pass. A step has at most as many passes as there are depths, so nobody
    waits for others without bound. A sequence for whose next plane there is no block waits for the
    next step.
    """
    report = StepReport(encoded_rows=sum(map(len, new_rows)))
    rule.begin_step(costs)
    max_depth = max((sequence.max_depth for sequence in scheduled), default=0)
    if new_rows:
        executor.encode(list(new_rows))
    order = sorted(scheduled, key=lambda sequence: -sequence.age)
    while (left := max_depth - len(report.passes)) > 0:
        if not _run_passes(order, row_budget, left, rule, executor, report):
            break
        report.waiting += report.ready
        wanting = [s for s in scheduled if s.wants_token and s.in_flight]
        running = [s for s in wanting if not (s.refined or s.stalled)]
        report.ready = sum(s.refined for s in wanting)
        report.wanting = report.ready + len(running)
        if report.ready and rule.ends(report.ready, running):
            break
    if not _decode(order, row_budget, executor, report):
        executor.settle()
    for sequence in scheduled:
        if sequence.refined and not sequence.wants_token:
            sequence.finish()
        sequence.age += 1
    return report


def _run_passes(
    order: Sequence[LoopedSequence],
    budget: int,
    most: int,
    rule: BoundaryRule,
    executor: StepExecutor,
    report: StepReport,
) -> bool:
    """A pass over whoever has something to refine and finds room, and, up to `most` in all, those
    after it that are foregone; False when nobody has.

    New positions come first and are never put off, for `h^0` is not kept.
    """
    wanted = [parts for sequence in order if (parts := sequence.next_rows())]
    in_all = sum(len(rows) for parts in wanted for rows in parts)
    batch = [rows for parts in wanted for rows in parts if rows.depth == 1]
    deeper = [parts for parts in wanted if parts[0].depth > 1]
    budget -= sum(map(len, batch))
    assert budget >= 0, "new positions exceed the row budget"
    for rows in batch:
        room = executor.make_room(rows)
        assert room == len(rows), "blocks of new positions are promised"
    shares = _shares([sum(map(len, parts)) for parts in deeper], budget)
    for parts, share in zip(deeper, shares, strict=True):
        batch += _with_room(parts, share, executor)
    if not batch:
        return False
    size = sum(map(len, batch))
    passes = _passes_ahead(order, batch, most) if size == in_all else 1
    if passes > 1:
        passes = executor.make_room_below(batch, passes)
        for rows in batch:
            rows.depth += passes - 1
    deciding = [i for i, rows in enumerate(batch) if rows.newest and rows.sequence.undecided]
    started = time.perf_counter()
    leaves = executor.run_passes(batch, passes, deciding)
    report.pass_seconds += [(time.perf_counter() - started) / passes] * passes
    report.passes += [size] * passes
    report.catch_up_rows += passes * sum(rows.catch_up for rows in batch)
    for rows in batch:
        rows.sequence.advance(rows, passes)
    for index, leaving in zip(deciding, leaves, strict=True):
        rows = batch[index]
        if rows.sequence.failure:
            continue
        rows.sequence.decide(rows.depth, leaving)
        rule.observe(rows.sequence, rows.depth)
    return True


def _passes_ahead(order: Sequence[LoopedSequence], batch: Sequence[Rows], most: int) -> int:
    """How many passes over the positions of `batch` come before there is anything to decide. One
    where somebody waits for the decoder: the boundary rule is asked after each pass."""
    passes = most
    for rows in batch:
        passes = min(passes, rows.sequence.passes_ahead(rows))
        if passes == 1:
            return 1
    return 1 if any(s.wants_token and s.refined for s in order) else passes


def _with_room(parts: Sequence[Rows], share: int, executor: StepExecutor) -> Iterator[Rows]:
    """Of a sequence's rows, from the first, as many as its share and the free blocks hold."""
    for rows in parts:
        wanted = rows.end
        rows.end = min(wanted, rows.start + share)
        share -= len(rows)
        room = executor.make_room(rows) if len(rows) else 0
        rows.sequence.stalled = room < len(rows)
        rows.end = rows.start + room
        if room:
            yield rows
        if rows.end < wanted:
            return  # what comes after attends to all of it


def _decode(
    order: Sequence[LoopedSequence], budget: int, executor: StepExecutor, report: StepReport
) -> bool:
    """Decodes those that have left; False when nobody has."""
    wanted = [s.rows_to_decode() for s in order if s.refined and s.wants_token]
    batch: list[Rows] = []
    shares = _shares([sum(map(len, parts)) for parts in wanted], budget)
    for parts, share in zip(wanted, shares, strict=True):
        for rows in parts:
            rows.end = min(rows.end, rows.start + share)
            share -= len(rows)
            if len(rows):
                batch.append(rows)
    if not batch:
        return False
    executor.decode(batch)
    report.decoder_rows = sum(map(len, batch))
    for rows in batch:
        if rows.sequence.failure:
            continue
        rows.sequence.advance_decoder(rows)
        if rows.newest:
            rows.sequence.finish()
            report.emitted.append(rows.sequence)
    return True


def _shares(wanted: Sequence[int], budget: int) -> list[int]:
    """How many rows each gets: at least an equal share of `budget`, if it wants that many; what is
    left over goes to the first."""
    equal = budget // max(1, len(wanted))
    owed = sum(min(want, equal) for want in wanted)
    shares = []
    for want in wanted:
        owed -= min(want, equal)
        shares.append(min(want, budget - owed))
        budget -= shares[-1]
    return shares
