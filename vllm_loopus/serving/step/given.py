"""What requests give for their first tokens, as rows of a table."""

from collections.abc import Sequence

import numpy as np

from vllm_loopus.serving.step.chunks import Ints


def with_row(table: Ints, index: int, given: Sequence[int], none: int) -> Ints:
    """`table` [S, G] with the row `given`, followed by `none` in any case."""
    if len(given) >= table.shape[1]:
        more = 2 * len(given) + 1 - table.shape[1]
        table = np.pad(table, ((0, 0), (0, more)), constant_values=none)
    table[index] = none
    table[index, : len(given)] = given
    return table
