"""What is no base, or a damaged one, is refused before anything is written, and says why."""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.bases import base_config, save_base
from tests.conftest import GOLDEN
from vllm_loopus.recast.base import EMBEDDING, HEAD, Base, find_checkpoint
from vllm_loopus.recast.convert import plan
from vllm_loopus.recast.cut import Cut
from vllm_loopus.recast.tensors import CheckpointError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_base("qwen3", folder)
    return folder


def change(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def replace_config(folder: Path, model_type: str, **fields: object) -> None:
    config = AutoConfig.for_model(model_type, **fields).to_dict()
    (folder / "config.json").write_text(json.dumps(config))


def sharded(folder: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


MOE = {"num_local_experts": 4, "num_hidden_layers": 4}
T5 = {"num_layers": 4}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "a JSON object"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "model_type=None is unknown"),
    "unknown type": (lambda f: change(f, model_type="qwen9"), "model_type='qwen9' is unknown"),
    "classifier": (
        lambda f: change(f, architectures=["Qwen3ForSequenceClassification"]),
        "is not a causal language model",
    ),
    "masked": (lambda f: replace_config(f, "bert"), "'bert'.* is not supported as a base"),
    "encoder-decoder": (lambda f: replace_config(f, "t5", **T5), "is an encoder-decoder model"),
    "experts": (lambda f: replace_config(f, "mixtral", **MOE), "is a mixture of experts"),
    "other experts": (lambda f: replace_config(f, "qwen3_moe"), "is a mixture of experts"),
    "unsupported": (lambda f: replace_config(f, "gpt2"), "'gpt2' is not supported as a base"),
    "unsupported text part": (
        lambda f: replace_config(f, "llava", text_config={"model_type": "gpt2"}),
        "its text part: 'gpt2'",
    ),
    "classifier in a wrapper": (
        lambda f: replace_config(f, "gemma3", architectures=["Gemma3ForSequenceClassification"]),
        "is not a causal language model",
    ),
    "type is a list": (lambda f: change(f, model_type=["qwen3"]), "a list of strings"),
    "architectures are numbers": (lambda f: change(f, architectures=[1]), "a list of strings"),
    "whole numbers": (lambda f: change(f, dtype="int8"), "dtype=torch.int8"),
    "quantised": (
        lambda f: change(f, quantization_config={"quant_method": "awq"}),
        "recast the model it was made from",
    ),
    "two layers": (
        lambda f: change(f, num_hidden_layers=2, layer_types=["full_attention"] * 2),
        "num_hidden_layers=2 has too few layers",
    ),
    "field of the wrong type": (lambda f: change(f, hidden_size="big"), "is not valid"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "no embedding": (lambda f: drop(f, EMBEDDING), "has no embedding"),
    "missing shard": (lambda f: sharded(f)[1].unlink(), "lacks model-00002-of-.*; download it"),
    "damaged index": (
        lambda f: (sharded(f), (f / "model.safetensors.index.json").write_text("{}")),
        "index.json is damaged",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-9]
        ),
        "model.safetensors is truncated",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is truncated"),
    "noise": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 999), "truncated or not"),
    "fp8": (
        lambda f: save_file(
            {EMBEDDING: torch.ones(4, 4).to(torch.float8_e4m3fn)}, f / "model.safetensors"
        ),
        "use the model before quantisation",
    ),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_refused(problem: str, base: Path) -> None:
    spoil, message = REFUSED[problem]
    spoil(base)
    with pytest.raises(CheckpointError, match=message):
        Base.open(str(base))


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": 0}, {"num_attention_heads": 0}, {"hidden_act": "bogus"}, {"head_dim": -1}],
)
def test_values_that_no_model_can_have(fields: dict[str, object], base: Path) -> None:
    change(base, **fields)
    with pytest.raises(ValueError, match=r"config\.json is not valid|do not fit"):
        plan(Base.open(str(base)), Cut(4, 1, 1))


def test_a_tensor_under_two_names(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, HEAD: torch.ones(2), "model.lm_head.weight": torch.ones(2)},
              base / "model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"has lm_head\.weight twice"):
        Base.open(str(base))


def test_a_revision_of_a_folder(base: Path) -> None:
    with pytest.raises(CheckpointError, match="revision='main' has no effect for the local folder"):
        Base.open(str(base), "main")


@pytest.mark.parametrize("kind", ["pickle with code", "damaged pickle"])
def test_pickles(kind: str, base: Path) -> None:
    (base / "model.safetensors").unlink()
    if kind == "pickle with code":
        torch.save({"w": Path("x")}, base / "pytorch_model.bin")
    else:
        (base / "pytorch_model.bin").write_bytes(b"PK\x03\x04" * 99)
    with pytest.raises(CheckpointError, match=r"is damaged, older than PyTorch 1\.6, or contains"):
        Base.open(str(base))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "missing: reasoning.layers.1.mlp"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), "unexpected: model.extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"decoder.norm.weight is \[3\]"),
    ],
)
def test_tensors_that_do_not_fit(spoil: Callable, message: str, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    spoil(tensors)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        plan(Base.open(str(base)), Cut(4, 1, 1))


def test_a_head_that_is_missing_and_not_tied(base: Path) -> None:
    change(base, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing: decoder\.lm_head\.weight"):
        plan(Base.open(str(base)), Cut(4, 1, 1))


def test_tied_and_untied_heads(base: Path, tmp_path: Path) -> None:
    opened = Base.open(str(base))
    assert opened.tensors[HEAD] is opened.tensors[EMBEDDING]
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, HEAD: torch.zeros(128, 64)}, base / "model.safetensors")
    # Both stored and different: transformers does not tie them either.
    assert Base.open(str(base)).tensors[HEAD].load().abs().sum() == 0


def test_a_window_that_cannot_be_is_refused_as_in_serving(base: Path) -> None:
    config = base_config("qwen3", rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                                                   "rope_theta": 1e4})  # fmt: skip
    (base / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match="dynamic"):
        plan(Base.open(str(base)), Cut(4, 1, 1))


def test_a_looped_model_is_no_base() -> None:
    with pytest.raises(CheckpointError, match="LoopUS model already; vllm-loopus convert"):
        Base.open(str(GOLDEN / "qwen3"))
    with pytest.raises(CheckpointError, match="LoopUS model already"):
        Base.open("loopus-tiny")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(CheckpointError, match="is neither a folder nor an alias"):
        Base.open(name)


def test_the_hub_is_asked_and_its_absence_told() -> None:
    with pytest.raises(CheckpointError, match="Qwen/Qwen3-4B could not be downloaded"):
        Base.open("Qwen/Qwen3-4B")


@pytest.mark.parametrize("kept", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_fetched(kept: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors, and pickled weights only where there are none; never other copies of both."""
    on_the_hub = ["config.json", "tokenizer.json", "consolidated.safetensors", "flax_model.msgpack",
                  "original/consolidated.pth", "LICENSE", kept]  # fmt: skip
    fetched: set[str] = set()
    folder = base.parent / "snapshots" / "0123abc"
    folder.mkdir(parents=True)

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("a/b", "v1")
        found = {f for f in on_the_hub if any(fnmatch(f, pattern) for pattern in allow_patterns)}
        fetched.update(found)
        for file in found:
            (folder / file).touch()
        return str(folder)

    monkeypatch.setattr("vllm_loopus.recast.base.snapshot_download", snapshot_download)
    assert find_checkpoint("a/b", "v1") == folder
    assert fetched == {"config.json", "tokenizer.json", "LICENSE", kept}


def test_a_snapshot_of_the_hub_tells_its_revision(base: Path, tmp_path: Path) -> None:
    commit = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    commit.parent.mkdir(parents=True)
    base.rename(commit)
    assert Base.open(str(commit)).revision == "0123abc"
    assert Base.open(str(commit)).repository == "a/b"
    assert Base.open("loopus-tiny-base").revision is None
