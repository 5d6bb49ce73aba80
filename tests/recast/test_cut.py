"""Cutting a base: every tensor lands where it belongs, and the looped model contains its base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_loopus.recast.cut import layer_runs, recast, rename
from vllm_loopus.tiny.tokenizer import build_tokenizer

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
BASES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**SIZES)),
}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    model_class, config = BASES[request.param]
    folder = tmp_path / "base"
    model_class(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 1), (0, 2), (2, 0)])
def test_one_open_loop_is_the_base(base: Path, tmp_path: Path, encoder: int, decoder: int) -> None:
    out = tmp_path / "looped"
    recast(str(base), out, encoder=encoder, decoder=decoder, max_loops=1)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        model.reasoning.gate.delta_proj.bias.fill_(-100)  # a = 1: the update is taken whole
        ids = torch.randint(0, 128, (2, 20))
        expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
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
