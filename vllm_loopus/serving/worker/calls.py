"""What the executor keeps of its calls: those that are prepared, and those whose outcome is to be
read."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_loopus.serving.model.deferred_writes import DeferredWrites
from vllm_loopus.serving.step.chunks import Bools, Chunks, Ints
from vllm_loopus.serving.worker.flight_states import Places
from vllm_loopus.serving.worker.regions import PreparedCall
from vllm_loopus.serving.worker.row_layout import RowLayout
from vllm_loopus.serving.worker.verdicts import Verdict


@dataclass(frozen=True)
class Prepared:
    """A call over `chunks` that is ready to be launched, but for its inputs."""

    chunks: Chunks
    layout: RowLayout
    source: Places | None  # of the states that it starts from
    call: PreparedCall | None


@dataclass
class LastPass:
    """The last pass of a step, and its outputs as they would be read from the pages. With graphs
    they lie in the output of one: nothing runs between two passes, and a graph's input is a copy.
    """

    layout: RowLayout
    state: torch.Tensor
    injected: torch.Tensor | None


class ExitReading:
    """What a pass decides, on its way to the host: a reading of `step/run.py`."""

    def __init__(self, verdict: Verdict, asked: Bools) -> None:
        """`asked` [S]: which of the deciding positions the exit rule was asked about."""
        self._verdict, self._asked = verdict, asked
        self.then: Callable[[Bools], None] | None = None

    def wait(self) -> Bools:
        exits = np.zeros(len(self._asked), dtype=bool)
        exits[self._asked] = self._verdict.wait()
        return exits

    def complete(self, leaving: Bools) -> None:
        """Writes what goes to deeper depths, before these are read. `leaving` [S]: which of the
        deciding positions exit in this pass."""
        if self.then is not None:
            self.then(leaving)


@dataclass
class Deferred:
    """What is written once it is known which rows have exited: K/V and `states` of the chunks
    `rows`, which are `of` [S] of the deciding ones, at `depth`."""

    chunks: Chunks
    layout: RowLayout
    deciding: Ints
    may_exit: Bools  # [S]
    states: torch.Tensor
    writes: DeferredWrites
