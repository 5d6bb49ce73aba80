"""Exit depths of generated tokens, from the engine core to the user's outputs.

The scheduler sends them in `EngineCoreOutput.routed_experts`, an array per token that vLLM has for
mixtures of experts and looped models do not use otherwise. `attach` removes them where vLLM builds
a `CompletionOutput`, so that nothing else sees them. A vLLM with per-token values of a model
(`patches/token-values-in-outputs.diff`) gets them there. This module does not import vLLM.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

ATTRIBUTE = "_loopus_exit_depths"  # of a request's state: all depths so far
NAME = "exit_depth"  # among the values of tokens, in a vLLM that carries such
SPAN = "_loopus_exit_depths_from"  # of a completion: that list, and where its tokens begin


def send(output: Any, depths: list[int]) -> None:
    """Puts the exit depths of its tokens into an engine core's output."""
    if hasattr(output, "token_values"):
        output.token_values = {NAME: depths}
    else:
        output.routed_experts = np.array(depths, dtype=np.uint16)


def attach(request_state: Any, completion: Any) -> None:
    """Moves what has arrived for a request to its completion, which was just built."""
    chunks = request_state.routed_experts_chunks
    if chunks and chunks[0].ndim == 1:
        if not hasattr(request_state, ATTRIBUTE):
            setattr(request_state, ATTRIBUTE, [])
        depths = getattr(request_state, ATTRIBUTE)
        for chunk in chunks:
            depths.extend(chunk.tolist())
        chunks.clear()
        completion.routed_experts = None
    depths = getattr(request_state, ATTRIBUTE, None)
    if depths is not None:
        # vLLM may append the tokens of later deltas to this completion: the list is shared.
        start = request_state.detokenizer.num_output_tokens() - len(completion.token_ids)
        setattr(completion, SPAN, (depths, start))


def exit_depths(output: Any) -> list[int]:
    """The exit depth of each generated token of a `RequestOutput` or a `CompletionOutput`.

    Of a streamed delta: of the tokens in it. Raises `ValueError` for a `RequestOutput` with more
    than one completion (give one of its `outputs`), and for outputs of a model without a loop.
    """
    completions = getattr(output, "outputs", None)
    if completions is not None:
        if len(completions) != 1:
            raise ValueError(
                f"the request has {len(completions)} completions; give one of its outputs"
            )
        output = completions[0]
    if NAME in (values := getattr(output, "token_values", None) or {}):
        return list(values[NAME])
    if not hasattr(output, SPAN):
        if len(output.token_ids) == 0:
            return []
        raise ValueError("this output has no exit depths: it is not from a looped model")
    depths, start = getattr(output, SPAN)
    return list(depths[start : start + len(output.token_ids)])


def exit_depths_in(metrics: Mapping[str, Any]) -> list[int]:
    """The exit depths in the statistics of a request, as a dict: `frontend/request_stats.py`,
    or those of a vLLM that carries a model's values of tokens."""
    if (values := metrics.get("token_values")) is not None:
        return list(values.get(NAME, []))
    return list(metrics.get("exit_depths") or [])
