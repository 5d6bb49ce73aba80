"""Losses over a large vocabulary without logits of all positions.

The logits of n positions over V tokens are often the largest tensors of a training step. They are
computed only for positions whose next token is a target; if they are many, a few rows at a time, in
the forward and again in the backward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vllm_loopus.backbones import BACKBONES
from vllm_loopus.training.objective import Labelled, token_losses

# Logits up to this size in float32 are kept for the backward. That is faster than computing them
# twice (docs/log.md), and the memory is bounded all the same.
KEPT_BYTES = 128 * 2**20
CHUNK_BYTES = 64 * 2**20


def token_scores(
    head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normed hidden states [n, H] and targets [n] -> token losses [n] in float32, and whether the
    most probable token is the target, bool [n].

    `softcap`: logits x become softcap * tanh(x / softcap). The LM head has no bias.
    """
    row = 4 * head.weight.shape[0]
    if len(hidden) * row <= KEPT_BYTES:
        logits = _capped(F.linear(hidden, head.weight), softcap)
        return token_losses(logits, targets), logits.detach().argmax(-1) == targets
    apply: Any = _ChunkedLosses.apply
    rows = max(1, CHUNK_BYTES // row)
    losses, right = apply(hidden, head.weight, targets, rows, softcap)
    return losses, right


class _ChunkedLosses(torch.autograd.Function):
    """Token losses; a chunk of logits exists only while it is used."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: int,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = hidden.device.type
        ctx.dtypes = hidden.dtype, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        losses, right = [], []
        for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = _capped(states @ weight.T, softcap)
            right.append(logits.argmax(-1) == wanted)
            losses.append(token_losses(logits, wanted))
        ctx.rows, ctx.softcap = rows, softcap
        ctx.save_for_backward(hidden, weight, targets)
        found = torch.cat(right)
        ctx.mark_non_differentiable(found)
        return torch.cat(losses), found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        by_hidden = torch.empty_like(hidden) if wants_hidden else None
        by_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            states = hidden[part]
            logits = _capped(states @ weight.T, ctx.softcap).float()
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            gradient = logits.softmax(-1)
            gradient[torch.arange(len(states), device=states.device), targets[part]] -= 1
            gradient *= gradients[0][part, None]
            if slope is not None:
                gradient *= slope
            gradient = gradient.to(hidden.dtype)
            if by_hidden is not None:
                by_hidden[part] = gradient @ weight
            if by_weight is not None and gradient.dtype == by_weight.dtype:
                by_weight.addmm_(gradient.T, states)
            elif by_weight is not None:
                by_weight += gradient.T @ states
        of_hidden, of_weight = ctx.dtypes
        return (
            None if by_hidden is None else by_hidden.to(of_hidden),
            None if by_weight is None else by_weight.to(of_weight),
            *(None, None, None),
        )


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class Scores:
    """Token losses and right tokens of a plain model, filled in by its forward."""

    losses: torch.Tensor
    right: torch.Tensor


@contextmanager
def plain_scores(model: Any, labelled: Labelled) -> Iterator[Scores | None]:
    """Makes the next forward of a plain causal LM score the labelled positions [n] only.

    The forward then returns logits of one position, which have no meaning. None for a model whose
    way from hidden states to logits is not known here; its logits are to be used.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if config.model_type not in BACKBONES or getattr(head, "bias", None) is not None:
        yield None
        return
    scores = Scores()
    softcap = getattr(config, "final_logit_softcapping", None)

    def score(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden = inputs[0].flatten(0, 1)[labelled.where]
        scores.losses, scores.right = token_scores(head, hidden, labelled.targets, softcap)
        return inputs[0][:1, :1]

    hook = head.register_forward_pre_hook(score)
    try:
        yield scores
    finally:
        hook.remove()
