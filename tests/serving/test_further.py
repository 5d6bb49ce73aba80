"""Tokens after the first one of a step."""

import numpy as np

from vllm_loopus.serving.step.chunks import Chunks
from vllm_loopus.serving.step.further import FurtherTokens
from vllm_loopus.serving.step.staircase import Staircases


def test_sequences_that_came_after_the_last_call_have_none() -> None:
    stairs = Staircases(4, slots=3)
    further = FurtherTokens(stairs)
    further.expect(Chunks.none())
    further.fill(np.zeros(0, dtype=np.int64))
    stairs.reserve(2 * stairs.capacity)
    last = np.array([stairs.capacity - 1])
    assert further.after(last, np.array([7])) == {}
    assert not len(further.take_given())
