"""Trajectories of the states of some tokens from depth to depth (figure 4 of the paper)."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_loopus.trace.record import number
from vllm_loopus.trace.reference import DepthValues

MOST, DRAWN = 128, 8  # maximum number of tokens in the PCA, and of those drawn, by default


def chosen_tokens(asked: str, num_tokens: int) -> list[int]:
    """Parses indices of an answer's tokens such as `0,2,5..8`.

    Raises `ValueError` for another format or an index out of range.
    """
    chosen: set[int] = set()
    for part in asked.split(","):
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part.strip(), re.ASCII)
        if found is None:
            raise ValueError(
                f"tokens={asked!r} must be indices such as 0,2,5..8, where 0 is the answer's first "
                "token"
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
    """PCA of states [M, H]: the coordinates [M, 2] and the axes' shares of the variance [2].

    The sign of each axis is chosen so that its largest loading is positive, independent of the
    library. Coordinates on an axis without variance are zero.
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

    - `tokens`: their indices, by default at most `MOST`, evenly spaced. `drawn`: those to draw.
    - `points[i][r]`: the coordinates of token `tokens[i]` at depth r.
    - `explained`: the axes' shares of the variance.
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
    """At most `most` of the indices, evenly spaced."""
    places = np.linspace(0, len(indices) - 1, min(most, len(indices)))
    return [indices[round(place)] for place in places.tolist()]
