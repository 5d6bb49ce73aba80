"""The losses of untrained cuts are those of the models that `recast` writes."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.bases import save_base
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.recast import representation
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.convert import recast
from vllm_loopus.recast.cut import Cut, ScoredCut, cuts_to_try, rank_by_loss
from vllm_loopus.recast.hidden_states import HiddenStates
from vllm_loopus.recast.untrained import untrained_losses


def written(base: Base, cut: Cut, ids: torch.Tensor, depth: int, folder: Path) -> float:
    """The loss of the recast model at a fixed depth."""
    out = folder / f"{cut.encoder}-{cut.decoder}-{depth}"
    ends = {"encoder": cut.encoder, "decoder": cut.decoder}
    recast(base, out, **ends, seed=3, max_loops=depth, min_loops=depth)
    model = LoopUSForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    return F.cross_entropy(logits.float(), ids[1:]).item()


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_losses_are_those_of_written_models(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(representation, "VOCABULARY_SLICE", 48)  # of 128
    save_base(kind, tmp_path / "base", num_hidden_layers=5)
    base = Base.open(str(tmp_path / "base"))
    ids = torch.randint(2, 100, (30,), generator=torch.Generator().manual_seed(0))
    model = HiddenStates(base, torch.device("cpu"), torch.float32)
    cuts = [Cut(5, 0, 2), Cut(5, 1, 1), Cut(5, 2, 0), Cut(5, 1, 3)]
    found = untrained_losses(base, cuts, [ids], model, seed=3)
    assert found.tokens == 29
    for cut in cuts:
        for depth in (1, 2):
            expected = written(base, cut, ids, depth, tmp_path)
            assert found.by_cut[cut][depth - 1] == pytest.approx(expected, abs=2e-4), (cut, depth)


def test_the_cuts_that_are_tried() -> None:
    assert cuts_to_try(4) == [Cut(4, 1, 1)]
    assert cuts_to_try(4, 1, 2) == [Cut(4, 1, 2)]
    found = cuts_to_try(30)
    assert len(found) == 16 and Cut(30, 1, 1) in found and Cut(30, 10, 10) in found
    assert all(30 - cut.encoder - cut.decoder >= 10 for cut in found)
    assert {cut.encoder for cut in cuts_to_try(30, encoder=3)} == {3}


def test_the_rule_takes_the_lowest_loss_that_loops_enough() -> None:
    few, middle, tied, wide = Cut(9, 4, 4), Cut(9, 3, 3), Cut(9, 2, 3), Cut(9, 1, 1)
    losses = {few: (1.0, 1.0), middle: (3.0, 2.004), tied: (2.9, 2.001), wide: (5.0, 4.0)}
    untried = ScoredCut(Cut(9, 2, 1), 0.9)
    ranked = rank_by_loss([0.5] * 9, [untried], losses)
    assert [one.cut for one in ranked] == [tied, middle, wide, few, untried.cut]
    assert ranked[0].losses == (2.9, 2.001)
