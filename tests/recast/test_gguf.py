"""A GGUF file as a base: what transformers reads of it is recast, and provenance says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from vllm_loopus.cli.main import app
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.gguf_file import GgufFile
from vllm_loopus.recast.provenance import file_hash
from vllm_loopus.recast.tensors import CheckpointError

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
HIDDEN, MIDDLE, LAYERS, HEADS = 64, 96, 4, 2


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat sat on the mat. " * 20], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]


def write(
    file: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_1,
    architecture: str = "llama",
    split: int = 0,
) -> Path:
    """A random Llama as GGUF; norms are kept in float32, as llama.cpp does."""
    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Small Llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|end|>" else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if split:
        writer.add_uint16("split.count", split)
    rng = np.random.default_rng(0)
    half = HIDDEN // HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (half, HIDDEN),
            f"blk.{layer}.attn_v": (half, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (MIDDLE, HIDDEN),
            f"blk.{layer}.ffn_up": (MIDDLE, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, MIDDLE),
        }
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if kind == gguf.GGMLQuantizationType.Q4_K:  # there is no Python quantiser; zeros will do
            blocks, size = gguf.GGML_QUANT_SIZES[kind]
            values = np.zeros((shape[0], max(1, shape[1] // blocks) * size), dtype=np.uint8)
        else:
            values = gguf.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    names = [f"blk.{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "ffn_norm")]
    for name in [*names, "output_norm"]:
        writer.add_tensor(f"{name}.weight", rng.normal(1, 0.1, HIDDEN).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf")


def own_logits(file: Path, ids: torch.Tensor) -> torch.Tensor:
    """What transformers reads of the file itself."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(ids).logits


IDS = torch.randint(1, 200, (2, 20), generator=torch.Generator().manual_seed(0))


def test_one_pass_with_an_open_gate_is_what_transformers_reads(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "looped"
    result = run("recast", file, "--out", out, "--tokens", "60", "--max-loops", "1")
    assert result.exit_code == 0, result.output
    model = LoopUSForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        model.reasoning.gate.A_log.fill_(-100)  # the state becomes the update
        logits = model(IDS).logits
    torch.testing.assert_close(logits, own_logits(file, IDS), atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|end|>"
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"


def test_provenance_card_and_info_are_true(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "looped"
    options = ("--encoder", "0", "--decoder", "3", "--no-analysis")
    assert run("recast", file, "--out", out, *options).exit_code == 0
    base = json.loads((out / "provenance.json").read_text())["base"]
    assert base["name"] == str(file) and base["sha256"] == {file.name: file_hash(file)}
    assert base["gguf"]["types"] == {"Q4_1": 29, "F32": 9}
    assert base["gguf"]["license"] == "apache-2.0"
    card = (out / "README.md").read_text()
    assert "dequantised to float32 (GGUF, Q4_1 (29 tensors), F32 (9 tensors))" in card
    assert "byte for byte" not in card
    told = run("info", out)
    assert str(file) in told.stdout.replace("\n", "") and "llama, 4 layers of 64" in told.stdout
    assert "is a GGUF file of a plain model" in run("info", file).stderr


def test_a_folder_with_one_file_is_meant_too(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(file.read_bytes())
    opened = Base.open(str(folder))
    assert opened.gguf is not None and opened.files == (folder / "model.gguf",)
    assert "model.embed_tokens.weight" in opened.tensors
    (folder / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF files \(model.gguf, other.gguf\)"):
        Base.open(str(folder))


def test_a_plain_checkpoint_for_the_control(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    assert run("convert", file, out).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, own_logits(file, IDS))
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["gguf"]["sha256"] == file_hash(file)
    assert "exists" in run("convert", file, out).stderr
    assert run("convert", file, out, "--force").exit_code == 0
    other = tmp_path / "foreign"
    other.mkdir()
    (other / "provenance.json").write_text("{}")
    refused = run("convert", file, other, "--force")
    assert refused.exit_code == 2 and "--force replaces nothing else" in refused.stderr
    refused = run("convert", file, tmp_path / "other", "--format", "lds")
    assert refused.exit_code == 2 and "format=lds is for LoopUS checkpoints" in refused.stderr
    looped = tmp_path / "looped"
    cut = ("--encoder", "0", "--decoder", "3", "--no-analysis")
    assert run("recast", file, "--out", looped, *cut).exit_code == 0
    sizes = ("--force", "--max-shard-size", "100KB")
    assert run("convert", file, looped, *sizes).exit_code == 0
    assert (looped / "model.safetensors.index.json").is_file()
    assert json.loads((looped / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_K"])
def test_types_that_are_read(kind: str, tmp_path: Path) -> None:
    found = GgufFile.open(write(tmp_path / "x.gguf", gguf.GGMLQuantizationType[kind]))
    assert kind in found.types and found.architecture == "llama"


def damaged(file: Path) -> Path:
    file.write_bytes(write(file).read_bytes()[:200])
    return file


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown type": (
        lambda f: write(f, gguf.GGMLQuantizationType.I8),
        "tensors of type I8 .*transformers cannot dequantise",
    ),
    "part": (lambda f: write(f, split=3), "one of 3 parts; merge them"),
    "damaged": (damaged, "is damaged"),
    "other architecture": (lambda f: write(f, architecture="clip"), "the architecture 'clip'"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gguf.quantize
    as_bytes = gguf.GGMLQuantizationType.I8
    monkeypatch.setattr(
        gguf, "quantize", lambda v, k: v.astype(np.int8) if k == as_bytes else original(v, k)
    )
    with pytest.raises(CheckpointError, match=message):
        Base.open(str(make(tmp_path / "bad.gguf")))
