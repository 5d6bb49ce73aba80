"""The terms of the training objective (arXiv 2605.11011).

Losses are sums over labelled tokens or documents, divided by counts that the caller gives. With the
counts of the whole batch, over all processes and micro-batches, the losses of the micro-batches add
up to the loss of the batch, however it is divided.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

IGNORED = -100  # the label of tokens that are not targets


@dataclass(frozen=True)
class Labelled:
    """The labelled positions of a batch of packed sequences [B, T], as indices into B * T.

    A document starts where position ids restart, and its first token is never a target. All tensors
    are int64, with n positions to predict from in D documents.

    - `where` [n]: positions whose next token is labelled; `targets` [n]: that token.
    - `document` [n]: the index of the document that each belongs to.
    - `last` [D]: the last position of each document.
    """

    where: torch.Tensor
    targets: torch.Tensor
    document: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, position_ids: torch.Tensor) -> "Labelled":
        """Finds the positions from labels and position ids, [B, T] each."""
        batch, length = labels.shape
        flat = torch.arange(batch * length, device=labels.device).view(batch, length)
        starts = position_ids == 0
        starts[:, 0] = True
        # A target must be in the same document as the token before it.
        target = (labels != IGNORED) & ~starts
        where = flat[target] - 1
        begins = flat[starts]
        ends = torch.cat([begins[1:], begins.new_tensor([batch * length])]) - 1
        inside = torch.searchsorted(begins, where, right=True) - 1
        present, document = torch.unique(inside, return_inverse=True)
        return cls(where, labels[target], document, ends[present])

    def __len__(self) -> int:
        return len(self.where)

    @property
    def documents(self) -> int:
        return len(self.last)


@dataclass(frozen=True)
class Counts:
    """The labelled tokens and documents of a whole batch, over which losses are averaged."""

    tokens: int
    documents: int


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`-log p(x_{t+1} | x_1..x_t)` [n] of logits [n, V], in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def language_modelling_loss(losses: torch.Tensor, counts: Counts) -> torch.Tensor:
    """`L_LM(h') = -1/T sum_t log p(x_{t+1} | D(h')_{1..t})`: token losses [n] -> a scalar."""
    return losses.sum() / max(counts.tokens, 1)


def monotonicity_loss(
    losses: torch.Tensor,
    losses_before: torch.Tensor,
    counts: Counts,
    labelled: Labelled | None = None,
) -> torch.Tensor:
    """`L_Mono = SiLU(L_LM(h') - L_LM(h))`: token losses [n] after and before the step -> a scalar.

    `losses_before` gets no gradient. With `labelled`, the equation is applied to each document,
    weighted by its number of targets. Without it, all of [n] count as one sequence, as in the
    released code, and the loss depends on how the batch is divided into micro-batches.
    """
    differences = losses - losses_before.detach()
    if labelled is None:
        size = losses.new_tensor([len(losses)])
        difference = differences.sum(0, keepdim=True)
    else:
        zeros = losses.new_zeros(labelled.documents)
        size = zeros.index_add(0, labelled.document, torch.ones_like(losses))
        difference = zeros.index_add(0, labelled.document, differences)
    return (size * F.silu(difference / size.clamp(min=1))).sum() / max(counts.tokens, 1)


def sequence_confidence_loss(
    q_logits: torch.Tensor, right: torch.Tensor, labelled: Labelled, counts: Counts
) -> torch.Tensor:
    """`L_Q = BCE(sigmoid(q), share of right tokens of the sequence at this step)`.

    `q_logits` [D]: of the last position of each document. `right` [n]: bool.
    """
    zeros = q_logits.new_zeros(len(q_logits))
    hits = zeros.index_add(0, labelled.document, right.to(zeros.dtype))
    size = zeros.index_add(0, labelled.document, torch.ones_like(right, dtype=zeros.dtype))
    losses = F.binary_cross_entropy_with_logits(q_logits, hits / size.clamp(min=1), reduction="sum")
    return losses / max(counts.documents, 1)


def token_confidence_loss(
    q_logits: torch.Tensor, right: torch.Tensor, counts: Counts
) -> torch.Tensor:
    """`L_Q` per token: `BCE(sigmoid(q_t), [argmax D(h')_t = x_{t+1}])`, for inputs [n]."""
    targets = right.to(q_logits.dtype)
    losses = F.binary_cross_entropy_with_logits(q_logits, targets, reduction="sum")
    return losses / max(counts.tokens, 1)
