"""How the states of some tokens move from depth to depth (the paper's figure 4)."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_loopus.trace.record import number
from vllm_loopus.trace.reference import DepthValues

MOST, DRAWN = 128, 8  # tokens that a PCA is of, and that are drawn, where none are chosen


def chosen_tokens(asked: str, num_tokens: int) -> list[int]:
    """Indices of an answer's tokens from `0,2,5..8`.

    Raises `ValueError` for an index that the answer does not have.
    """
    chosen: set[int] = set()
    for part in asked.split(","):
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part.strip(), re.ASCII)
        if found is None:
            raise ValueError(
                f"tokens={asked!r} must be indices such as 0,2,5..8, counted from the answer's "
                "first token"
            )
        run = range(int(found[1]), int(found[2] or found[1]) + 1)
        if not run or run[-1] >= num_tokens:
            raise ValueError(
                f"tokens={asked!r}: {part.strip()} is not within 0..{num_tokens - 1}, the tokens "
                "of the answer"
            )
        chosen.update(run)
    return sorted(chosen)


def principal_components(states: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """PCA of states [M, H]: coordinates [M, 2] and the shares of variance [2] of both axes.

    Each axis points where its largest loading is positive, so that signs do not depend on the
    library. An axis without variance is zero.
    """
    centred = states.double().numpy()
    centred = centred - centred.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    variance = singular**2
    total = variance.sum()
    points, shares = np.zeros((len(centred), 2)), np.zeros(2)
    for axis in range(min(2, len(axes))):
        if total > 0 and variance[axis] > 1e-12 * total:
            loading = axes[axis]
            sign = np.sign(loading[np.abs(loading).argmax()])
            points[:, axis] = centred @ loading * sign
            shares[axis] = variance[axis] / total
    return points, shares


def trajectories(values: DepthValues, chosen: Sequence[int] | None = None) -> dict[str, Any]:
    """One PCA over the states of tokens at depths 0..N, as JSON.

    `tokens` are their indices: those chosen, or all of a short answer. `points[i][r]` is the place
    of token `tokens[i]` at depth r, `explained` the axes' shares of the variance, `drawn` the
    tokens to draw.
    """
    num_tokens = values.states.shape[1]
    tokens = _spread(range(num_tokens), MOST) if chosen is None else list(chosen)
    states = values.states[:, tokens].transpose(0, 1)  # [tokens, N + 1, H]
    points, shares = principal_components(states.flatten(0, 1))
    shaped = points.reshape(*states.shape[:2], 2)
    return {
        "tokens": tokens,
        "drawn": tokens if chosen is not None else _spread(tokens, DRAWN),
        "explained": [number(share) for share in shares],
        "points": [[[number(c) for c in point] for point in path] for path in shaped],
    }


def _spread(indices: Sequence[int], most: int) -> list[int]:
    """At most so many of the indices, evenly."""
    places = np.linspace(0, len(indices) - 1, min(most, len(indices)))
    return [indices[round(place)] for place in places.tolist()]
