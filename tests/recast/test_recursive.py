"""`vllm-loopus recast --method recursive`: what it writes, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.bases import BASES, load_base, save_base
from tests.recast.test_cli import TINY, refused, run
from vllm_loopus.architectures.recursive.config import RecursiveConfig
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.convert import WriteOptions
from vllm_loopus.recast.provenance import file_hash
from vllm_loopus.recast.recursive import plan, sources_of_tied

RECURSIVE = ("--method", "recursive")
FULL = 64


@pytest.fixture(scope="module")
def recast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recast") / "my-recursive"
    result = run("recast", TINY, *RECURSIVE, "--loops", 2, "--lora-rank", 8, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 loops of 2 layers, tied by stepwise" in result.stdout
    assert f"vllm serve {out}" in result.stdout
    return out


def test_everything_is_there(recast: Path) -> None:
    config = RecursiveConfig.from_pretrained(recast)
    fields = (config.loops, config.max_loops, config.lora_rank, config.tie, config.model_type)
    assert fields == (2, 2, 8, "stepwise", "recursive_transformer")
    provenance = json.loads((recast / "provenance.json").read_text())
    assert provenance["method"] == "recursive" and provenance["base"]["name"] == TINY
    assert provenance["weights_sha256"] == {
        "model.safetensors": file_hash(recast / "model.safetensors")
    }
    card = (recast / "README.md").read_text()
    assert "block\nof 2 tied layers is run 2 times" in card and "LoRA of rank 8" in card
    assert "data:image/png" in (recast / "report.html").read_text()
    assert (recast / "tokenizer.json").is_file()
    kept = json.loads((recast / "analysis.json").read_text())["kept"]
    # Layers 0 and 3 are those that the tied ones are taken from.
    for by_layer in kept.values():
        assert by_layer["0"] == by_layer["3"] == 1
        assert 0.2 < by_layer["1"] < 1 and 0.2 < by_layer["2"] < 1


def test_tensors_are_the_best_of_their_rank(recast: Path) -> None:
    tensors, base = load_file(recast / "model.safetensors"), Base.open(TINY).tensors
    name = "self_attn.q_proj"
    tied = tensors[f"model.layers.1.{name}.weight"]
    own = base[f"model.layers.1.{name}.weight"].load().float()
    assert torch.equal(tied, base[f"model.layers.3.{name}.weight"].load())
    lora = f"model.loops.0.layers.1.{name}."
    found = tensors[f"{lora}lora_B.weight"] @ tensors[f"{lora}lora_A.weight"]
    u, s, v = torch.linalg.svd(own - tied.float())
    torch.testing.assert_close(found, (u[:, :8] * s[:8]) @ v[:8], atol=1e-5, rtol=0)
    norm = "input_layernorm.weight"
    of_loop = tensors[f"model.loops.1.layers.0.{norm}"]
    assert torch.equal(of_loop, base[f"model.layers.2.{norm}"].load())


def test_which_layers_are_tied() -> None:
    assert sources_of_tied("stepwise", 18, 2) == [[0], [2], [4], [6], [8], [11], [13], [15], [17]]
    assert sources_of_tied("lower", 6, 2) == [[0], [1], [2]]
    assert sources_of_tied("average", 6, 3) == [[0, 2, 4], [1, 3, 5]]
    assert sources_of_tied("stepwise", 4, 4) == [[0]]


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_full_rank_is_the_base(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_base(name, base, **({"max_window_layers": 0} if name == "qwen2" else {}))
    planned = plan(Base.open(str(base)), loops=2, lora_rank=FULL, tie="average")
    planned.write(tmp_path / "out", WriteOptions())
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    ids = torch.randint(2, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(ids).logits, load_base(base)(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--loops 3 --lora-rank 8", "loops=3 does not divide the 4 layers .* one of 1, 2, 4"),
        ("--loops 0 --lora-rank 8", "loops=0 must be from 1"),
        ("--loops -2 --lora-rank 8", "loops=-2 must be from 1"),
        ("--loops 2 --lora-rank 65", "lora_rank=65 is beyond .* rank 64; give 0 to 64"),
        ("--loops 2 --lora-rank -1", "lora_rank=-1 must be 0"),
        ("--loops 2 --lora-rank 8 --tie some", "tie='some' is unknown; choose one of stepwise"),
        ("--lora-rank 8", "needs --loops"),
        ("--loops 2", "needs --lora-rank"),
        ("--loops 2 --lora-rank 8 --encoder 0..0", "--encoder 0..0 has no effect with --method"),
        ("--loops 2 --lora-rank 8 --format lds", "--format lds has no effect with --method"),
    ],
)
def test_refused(options: str, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert re.search(message, refused("recast", TINY, *RECURSIVE, *options.split(), "--out", out))
    assert not out.exists()


def test_options_of_the_other_method(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--loops 2 has no effect with --method loopus" in refused(
        "recast", TINY, "--loops", 2, "--out", out
    )


def test_what_cannot_be_a_base(recast: Path, tmp_path: Path) -> None:
    options = ("--loops", 1, "--lora-rank", 2, "--out", tmp_path / "out")
    assert "is a looped model already" in refused("recast", recast, *RECURSIVE, *options)
    save_base("gemma2", tmp_path / "gemma")
    options = ("--loops", 4, "--lora-rank", 2, "--out", tmp_path / "out")
    message = refused("recast", tmp_path / "gemma", *RECURSIVE, *options)
    assert "loops=4 ties layer 1" in message and "layer_types" in message


def test_fields_of_a_checkpoint_that_do_not_fit(recast: Path) -> None:
    config = RecursiveConfig.from_pretrained(recast)
    config.max_loops = 3
    with pytest.raises(ValueError, match="max_loops=3 must be from 1 to 2: the checkpoint has"):
        config.check()
    config.max_loops = 0
    with pytest.raises(ValueError, match="max_loops=0 must be from 1"):
        config.check()
    config.max_loops, config.halting_strategy = 2, "cdf"
    with pytest.raises(ValueError, match="halting_strategy='cdf' is unknown; choose one of none"):
        config.check()
