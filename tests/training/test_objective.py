"""Each term of the objective against numbers worked out by hand."""

import math

import pytest
import torch

from vllm_loopus.training.objective import (
    Counts,
    Labelled,
    language_modelling_loss,
    monotonicity_loss,
    sequence_confidence_loss,
    token_confidence_loss,
    token_losses,
)

# Two rows: documents of 3, 2 and 1 tokens; a document of 4, and 2 of padding.
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
LABELS = torch.tensor([[5, 6, 7, 8, 9, 4], [-100, -100, 3, 2, -100, -100]])


@pytest.fixture
def labelled() -> Labelled:
    return Labelled.of(LABELS, POSITIONS)


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def bce(q: float, target: float) -> float:
    p = 1 / (1 + math.exp(-q))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def test_targets_stay_in_their_document(labelled: Labelled) -> None:
    """The first token of a document is never a target, whatever its label says."""
    assert labelled.where.tolist() == [0, 1, 3, 7, 8]
    assert labelled.targets.tolist() == [6, 7, 9, 3, 2]
    assert labelled.document.tolist() == [0, 0, 1, 2, 2]
    assert labelled.last.tolist() == [2, 4, 9]  # the document of one token has no target


def test_language_modelling_loss() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    losses = token_losses(logits, torch.tensor([0, 1]))
    expected = -math.log(0.5) - math.log(0.1)
    assert losses.sum().item() == pytest.approx(expected)
    # 2 of the 8 labelled tokens of a batch.
    part = language_modelling_loss(losses, Counts(tokens=8, documents=2))
    assert part.item() == pytest.approx(expected / 8)


def test_monotonicity_loss(labelled: Labelled) -> None:
    losses = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.5])
    before = torch.tensor([2.0, 1.0, 1.0, 2.0, 1.0])
    counts = Counts(tokens=5, documents=3)
    # Means of the documents: 2 - 1.5, 2 - 1 and 0.5 - 1.5, of 2, 1 and 2 tokens.
    expected = (2 * silu(0.5) + silu(1.0) + 2 * silu(-1.0)) / 5
    assert monotonicity_loss(losses, before, counts, labelled).item() == pytest.approx(expected)
    # As released: SiLU of the difference of the means of all.
    assert monotonicity_loss(losses, before, counts).item() == pytest.approx(silu(1.4 - 1.4))
    assert monotonicity_loss(losses + 1, before, counts).item() == pytest.approx(silu(1.0))


def test_monotonicity_gradient_reaches_the_later_loss_only() -> None:
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    before = torch.tensor([2.0, 0.5], requires_grad=True)
    monotonicity_loss(losses, before, Counts(2, 1)).backward()
    x = 1.5 - 1.25
    sigmoid = 1 / (1 + math.exp(-x))
    slope = sigmoid * (1 + x * (1 - sigmoid))
    assert losses.grad is not None
    torch.testing.assert_close(losses.grad, torch.full((2,), slope / 2))
    assert before.grad is None


def test_confidence_losses(labelled: Labelled) -> None:
    right = torch.tensor([True, False, True, False, False])
    q = torch.tensor([0.5, -1.0, 2.0])
    expected = (bce(0.5, 0.5) + bce(-1.0, 1.0) + bce(2.0, 0.0)) / 4
    loss = sequence_confidence_loss(q, right, labelled, Counts(tokens=9, documents=4))
    assert loss.item() == pytest.approx(expected)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    expected = sum(bce(x.item(), float(y)) for x, y in zip(q, right, strict=True)) / 9
    loss = token_confidence_loss(q, right, Counts(tokens=9, documents=4))
    assert loss.item() == pytest.approx(expected)


def test_parts_of_a_batch_add_up() -> None:
    """A row each, with the counts of both, give the losses of both together."""
    torch.manual_seed(0)
    logits, before = torch.randn(12, 10), torch.randn(12, 10)
    q = torch.randn(12)

    def losses(rows: slice, counts: Counts) -> list[torch.Tensor]:
        part = Labelled.of(LABELS[rows], POSITIONS[rows])
        start = (rows.start or 0) * 6
        at = logits[start:][part.where]
        new, old = (token_losses(x[start:][part.where], part.targets) for x in (logits, before))
        right = at.argmax(-1) == part.targets
        return [
            language_modelling_loss(new, counts),
            monotonicity_loss(new, old, counts, part),
            sequence_confidence_loss(q[start:][part.last], right, part, counts),
            token_confidence_loss(q[start:][part.where], right, counts),
        ]

    counts = Counts(tokens=5, documents=3)
    whole = losses(slice(None), counts)
    parts = [losses(slice(row, row + 1), counts) for row in range(2)]
    for together, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close(together, first + second)


def test_nothing_labelled() -> None:
    """A process may get a part without targets: losses of zero, with a graph."""
    empty = Labelled.of(torch.full((1, 4), -100), torch.arange(4)[None])
    assert len(empty) == empty.documents == 0
    logits = torch.randn(4, 10, requires_grad=True)
    losses = token_losses(logits[empty.where], empty.targets)
    q = logits[empty.last, 0]
    total = monotonicity_loss(losses, losses, Counts(3, 1), empty)
    total = total + language_modelling_loss(losses, Counts(3, 1))
    total = total + sequence_confidence_loss(q, losses > 0, empty, Counts(3, 1))
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None and not logits.grad.any()
