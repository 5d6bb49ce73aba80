"""Cutting a base: every tensor lands where it belongs, and the looped model contains its base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.bases import BASES, WINDOW, load_base, save_base
from vllm_loopus.recast.cut import layer_runs, recast, rename


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_base(request.param, folder)
    return folder


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 1), (0, 2), (2, 0)])
def test_one_open_loop_is_the_base(base: Path, tmp_path: Path, encoder: int, decoder: int) -> None:
    out = tmp_path / "looped"
    recast(str(base), out, encoder=encoder, decoder=decoder, max_loops=1)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        model.reasoning.gate.delta_proj.bias.fill_(-100)  # a = 1: the update is taken whole
        ids = torch.randint(0, 128, (2, 2 * WINDOW))
        expected = load_base(base)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)


def test_written_once_and_whole(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "looped"
    recast(str(base), out, encoder=1, decoder=1)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "looped"}
    tensors = load_file(out / "model.safetensors")
    assert tensors["decoder.lm_head.weight"].shape == tensors["encoder.embed_tokens.weight"].shape
    assert str(tmp_path) not in (out / "config.json").read_text().replace(str(base), "")
    with pytest.raises(FileExistsError, match="choose another folder"):
        recast(str(base), out, encoder=1, decoder=1)


def test_nothing_left_to_loop() -> None:
    with pytest.raises(ValueError, match="encoder=2 and decoder=2 leave no layer of 4"):
        layer_runs(4, encoder=2, decoder=2)


def test_rename() -> None:
    runs = layer_runs(4, encoder=1, decoder=1)
    assert rename("model.layers.2.mlp.up_proj.weight", runs) == (
        "reasoning.layers.1.mlp.up_proj.weight"
    )
    assert rename("model.layers.3.input_layernorm.weight", runs).startswith("decoder.layers.0.")
    with pytest.raises(ValueError, match=r"model\.layers\.9\.x"):
        rename("model.layers.9.x", runs)
