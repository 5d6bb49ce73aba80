"""Conversion: every tensor lands where it belongs, byte for byte; nothing is left half-written."""

import errno
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.bases import BASES, WINDOW, base_config, load_base, save_base
from tests.conftest import GOLDEN
from tests.modeling.test_checkpoint import old_name
from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.recast import tensors as tensor_files
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.convert import WriteOptions, convert, looped_name, recast
from vllm_loopus.recast.cut import Cut


@pytest.fixture(params=[*BASES, "loopus-tiny-base"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in EMBEDDED:
        return EMBEDDED[request.param]
    save_base(request.param, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    save_base("qwen3", tmp_path / "base")
    return tmp_path / "base"


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):  # golden folders hold traces as well
        found.update(load_file(file))
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


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


def test_every_byte_of_the_base_is_kept(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "looped"
    recast(str(base), out, encoder=1, decoder=1, options=WriteOptions(max_shard_size="50KB"))
    before, after = all_tensors(base), all_tensors(out)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    before.setdefault("lm_head.weight", before["model.embed_tokens.weight"])
    for name, tensor in before.items():
        found = after.pop(looped_name(name, Cut(4, 1, 1)))
        assert found.dtype == tensor.dtype and raw(found) == raw(tensor)
    assert {name.split(".")[0] for name in after} == {"reasoning", "q_head"}
    assert all("gate" in name or "q_head" in name for name in after)
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype}


@pytest.mark.parametrize("backbone", ["qwen3", "llama", "phi3"])
def test_released_format_round_trip(backbone: str, tmp_path: Path) -> None:
    source = GOLDEN / backbone
    convert(str(source), tmp_path / "own", WriteOptions("loopus"))
    convert(str(tmp_path / "own"), tmp_path / "back", WriteOptions("lds", max_shard_size="300KB"))
    assert json.loads((tmp_path / "own/config.json").read_text())["model_type"] == "loopus"
    before = all_tensors(source)
    for folder in (tmp_path / "own", tmp_path / "back"):
        after = all_tensors(folder)
        assert after.keys() == before.keys()
        assert all(raw(after[name]) == raw(tensor) for name, tensor in before.items())
    released = json.loads((source / "config.json").read_text())
    again = json.loads((tmp_path / "back/config.json").read_text())
    again_base, released_base = again.pop("base_config_dict"), released.pop("base_config_dict")
    assert {name: again[name] for name in released} == released
    known = released_base.keys() & again_base.keys() - {"transformers_version"}
    assert {name: again_base[name] for name in known} == {
        name: released_base[name] for name in known
    }
    was, now = (LoopUSConfig.from_pretrained(f) for f in (source, tmp_path / "back"))
    assert now.to_dict()["base_config"] == was.to_dict()["base_config"]


def test_what_the_released_format_does_not_know(tmp_path: Path, qwen3: Path) -> None:
    out = tmp_path / "looped"
    options = WriteOptions("lds")
    recast(str(qwen3), out, encoder=1, decoder=1, options=options, min_loops=2)
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == "lds" and written["min_loops"] == 2
    assert "confidence_input" not in written  # at its default
    assert LoopUSConfig.from_pretrained(out).min_loops == 2


@pytest.mark.parametrize("form", ["old-names", "combined_model.pt"])
def test_older_checkpoints_are_brought_up_to_date(form: str, tmp_path: Path) -> None:
    source, before = tmp_path / "old", all_tensors(GOLDEN / "llama")
    source.mkdir()
    shutil.copy(GOLDEN / "llama/config.json", source)
    renamed = {old_name(name): tensor for name, tensor in before.items()}
    if form == "old-names":
        save_file(renamed, source / "model.safetensors")
    else:
        torch.save(renamed, source / form)
    convert(str(source), tmp_path / "new", WriteOptions())
    after = all_tensors(tmp_path / "new")
    assert after.keys() == before.keys()
    assert all(raw(after[name]) == raw(tensor) for name, tensor in before.items())


def test_pickled_base(tmp_path: Path, qwen3: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(qwen3 / "config.json", pickled)
    torch.save(load_file(qwen3 / "model.safetensors"), pickled / "pytorch_model.bin")
    for source, out in ((qwen3, "a"), (pickled, "b")):
        recast(str(source), tmp_path / out, encoder=1, decoder=1)
    first, second = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    held = Base.open(str(pickled)).tensors.values()
    assert all(isinstance(tensor, tensor_files.PickledTensor) for tensor in held)  # none in memory


def test_tokenizer_template_and_generation_config_are_copied(tmp_path: Path, qwen3: Path) -> None:
    GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(qwen3)
    (qwen3 / "chat_template.jinja").write_text("{{ messages }}")
    recast(str(qwen3), tmp_path / "looped", encoder=1, decoder=1)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "looped" / name).read_bytes() == (qwen3 / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "looped").chat_template == "{{ messages }}"


def test_gate_and_head_follow_the_seed(tmp_path: Path, qwen3: Path) -> None:
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        recast(str(qwen3), tmp_path / out, encoder=1, decoder=1, seed=seed)
    a, b, c = (all_tensors(tmp_path / out) for out in "abc")
    name = "reasoning.gate.delta_proj.weight"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_no_code_is_asked_for(tmp_path: Path, qwen3: Path) -> None:
    file = qwen3 / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.Evil"}}))
    recast(str(qwen3), tmp_path / "looped", encoder=1, decoder=1)
    written = (tmp_path / "looped/config.json").read_text()
    assert json.loads(written)["architectures"] == ["LoopUSForCausalLM"]
    assert "auto_map" not in written


def test_composite_checkpoint_gives_its_text_part(tmp_path: Path) -> None:
    """As a multimodal Gemma-3 lies on disk: a config in a config, names with a prefix."""
    save_base("gemma3_text", tmp_path / "text")
    text = base_config("gemma3_text").to_dict()
    whole = tmp_path / "whole"
    whole.mkdir()
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "dtype": "float32",
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32},
    }
    (whole / "config.json").write_text(json.dumps(config))
    plain = all_tensors(tmp_path / "text")
    for prefix in ("language_model.model.", "model.language_model."):
        named = {name.replace("model.", prefix, 1): tensor for name, tensor in plain.items()}
        save_file({**named, "vision_tower.x": torch.ones(2)}, whole / "model.safetensors")
        opened = Base.open(str(whole))
        assert opened.left_out == ("vision_tower.x",)
        out = tmp_path / prefix
        recast(opened, out, encoder=1, decoder=1)
        recast(str(tmp_path / "text"), tmp_path / f"{prefix}-text", encoder=1, decoder=1)
        first, second = all_tensors(out), all_tensors(tmp_path / f"{prefix}-text")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_written_whole_or_not_at_all(
    tmp_path: Path, qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "looped"

    def full(folder: Path, tensors: object, max_shard_size: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vllm_loopus.recast.convert.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        recast(str(qwen3), out, encoder=1, decoder=1)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    monkeypatch.undo()
    recast(str(qwen3), out, encoder=1, decoder=1)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "looped"}
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()

    before = (out / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="exists; choose another folder or give --force"):
        recast(str(qwen3), out, encoder=1, decoder=1, max_loops=3)
    monkeypatch.setattr("vllm_loopus.recast.convert.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        recast(str(qwen3), out, encoder=1, decoder=1, options=WriteOptions(force=True))
    assert (out / "config.json").read_bytes() == before  # what was there still is
    monkeypatch.undo()
    recast(str(qwen3), out, encoder=1, decoder=1, options=WriteOptions(force=True), max_loops=3)
    assert json.loads((out / "config.json").read_text())["max_loops"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"base", "looped"}


def test_force_deletes_checkpoints_only(tmp_path: Path, qwen3: Path) -> None:
    options = WriteOptions(force=True)
    with pytest.raises(FileExistsError, match="is or contains the model to read"):
        recast(str(qwen3), qwen3, encoder=1, decoder=1, options=options)
    with pytest.raises(FileExistsError, match="is or contains the model to read"):
        recast(str(qwen3), tmp_path, encoder=1, decoder=1, options=options)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "one.png").touch()
    (other / "config.json").write_text('{"port": 80}')
    with pytest.raises(FileExistsError, match="is not a checkpoint that vllm-loopus"):
        recast(str(qwen3), other, encoder=1, decoder=1, options=options)
    assert (qwen3 / "config.json").is_file() and (other / "one.png").is_file()


def test_interrupted_at_the_last_moment(
    tmp_path: Path, qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between moving the old checkpoint away and the new one in, the old one comes back."""
    out = tmp_path / "new"  # as the folder is named that it is written in
    recast(str(qwen3), out, encoder=1, decoder=1)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == out and self.parent.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recast(str(qwen3), out, encoder=1, decoder=1, options=WriteOptions(force=True), max_loops=3)
    assert LoopUSConfig.from_pretrained(out).max_loops == 8
    assert {path.name for path in tmp_path.iterdir()} == {"base", "new"}


def test_told_to_stop(tmp_path: Path, qwen3: Path) -> None:
    def stop(folder: Path, hashes: dict[str, str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        recast(str(qwen3), tmp_path / "x", encoder=1, decoder=1, options=WriteOptions(finish=stop))
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    assert signal.getsignal(signal.SIGTERM) == before


def test_too_little_space_is_noticed_first(
    tmp_path: Path, qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs \d+ MiB, but its device has 0 MiB free"):
        recast(str(qwen3), tmp_path / "looped", encoder=1, decoder=1)


def test_one_piece_at_a_time(tmp_path: Path, qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is a piece, whatever the tensors: no tensor of the base is loaded."""
    monkeypatch.setattr(tensor_files, "PIECE", 1000)
    monkeypatch.setattr(tensor_files.StoredTensor, "load", lambda self: pytest.fail(self.name))
    pieces: list[int] = []
    original = tensor_files.StoredTensor.pieces

    def watched(self: tensor_files.StoredTensor) -> object:
        for piece in original(self):
            pieces.append(len(piece))
            yield piece

    monkeypatch.setattr(tensor_files.StoredTensor, "pieces", watched)
    recast(str(qwen3), tmp_path / "looped", encoder=1, decoder=1)
    assert max(pieces) == 1000
    assert sum(pieces) > 100_000


def test_hashes_are_of_the_files(tmp_path: Path, qwen3: Path) -> None:
    seen: dict[str, str] = {}
    options = WriteOptions(max_shard_size="50KB", finish=lambda _folder, found: seen.update(found))
    recast(str(qwen3), tmp_path / "looped", encoder=1, decoder=1, options=options)
    files = list((tmp_path / "looped").glob("*.safetensors"))
    assert seen == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("size", ["5", "0GB", "GB", "5 PB", "-1GB"])
def test_bad_shard_size(size: str) -> None:
    with pytest.raises(ValueError, match="max_shard_size="):
        WriteOptions(max_shard_size=size)


def test_convert_wants_a_looped_model(tmp_path: Path, qwen3: Path) -> None:
    with pytest.raises(ValueError, match="is not a LoopUS checkpoint; vllm-loopus recast"):
        convert(str(qwen3), tmp_path / "out", WriteOptions())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
