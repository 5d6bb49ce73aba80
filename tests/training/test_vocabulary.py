"""Losses in chunks are the losses of whole logits, with the same gradients."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.bases import save_base
from vllm_loopus.training import vocabulary
from vllm_loopus.training.objective import Labelled, token_losses
from vllm_loopus.training.vocabulary import plain_scores, token_scores


def both(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, train_head: bool
) -> list[tuple[torch.Tensor, ...]]:
    """Losses, right tokens and gradients with all logits, and with chunks of three rows."""
    torch.manual_seed(1)
    head = nn.Linear(8, 50, bias=False).requires_grad_(train_head)
    states, targets, weights = torch.randn(10, 8), torch.randint(50, (10,)), torch.rand(10)
    targets[:4] = head(states).argmax(-1)[:4]  # some are right
    found = []
    for kept in (vocabulary.KEPT_BYTES, 0):
        monkeypatch.setattr(vocabulary, "KEPT_BYTES", kept)
        monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 3 * 4 * 50)
        hidden = states.clone().requires_grad_()
        head.weight.grad = None
        losses, right = token_scores(head, hidden, targets, softcap)
        (losses * weights).sum().backward()
        gradient = head.weight.grad if train_head else torch.zeros(0)
        found.append((losses.detach(), right, hidden.grad, gradient))
    return found


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("train_head", [True, False])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, train_head: bool
) -> None:
    whole, chunked = both(monkeypatch, softcap, train_head)
    assert whole[1].tolist() == chunked[1].tolist() and whole[1].any() and not whole[1].all()
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_plain_model_scores_labelled_positions_alone(
    kind: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_base(kind, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(2, 100, (2, 7))
    labels = ids.masked_fill(torch.arange(7) < 4, -100)
    positions = torch.arange(7).repeat(2, 1)
    labelled = Labelled.of(labels, positions)
    logits = model(ids, position_ids=positions).logits.flatten(0, 1)[labelled.where]
    monkeypatch.setattr(vocabulary, "KEPT_BYTES", kept)
    with plain_scores(model, labelled) as scores:
        model(ids, position_ids=positions)
    assert scores is not None
    torch.testing.assert_close(scores.losses, token_losses(logits, labelled.targets))
    assert torch.equal(scores.right, logits.argmax(-1) == labelled.targets)
