"""How fast states converge: values by depth over all tokens of a data set."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from vllm_loopus.trace.record import number
from vllm_loopus.trace.reference import DepthValues

QUANTILES = (0.1, 0.5, 0.9)
SUMMARISED = ("distance_to_last", "kl_to_last")


def convergence(values: Iterable[DepthValues]) -> dict[str, Any]:
    """Statistics by depth over the tokens of all answers, as JSON.

    `agreement`: the share of tokens with the same most probable token as at the last depth. The
    other values are `{"mean": ..., "quantiles": {"0.1": ...}}`.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    own: list[str] = []
    for one in values:
        own = list(one.by_name)
        for name in SUMMARISED:
            parts.setdefault(name, []).append(getattr(one, name))
        for name, tensor in one.by_name.items():
            parts.setdefault(name, []).append(tensor)
        best = one.top_ids[..., 0]
        parts.setdefault("agreement", []).append((best == best[-1]).float())
    columns = {name: torch.cat(tensors, dim=1).double().numpy() for name, tensors in parts.items()}
    num_depths, num_tokens = columns["agreement"].shape
    depths = []
    for row in range(num_depths):
        summary: dict[str, Any] = {
            "depth": row + 1,
            "agreement": number(columns["agreement"][row].mean()),
        }
        for name in (*own, *SUMMARISED):
            column = columns[name][row]
            found = np.quantile(column, QUANTILES).tolist()
            summary[name] = {
                "mean": number(column.mean()),
                "quantiles": {f"{q:g}": number(v) for q, v in zip(QUANTILES, found, strict=True)},
            }
        depths.append(summary)
    return {"num_tokens": num_tokens, "depths": depths}
