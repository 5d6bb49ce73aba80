"""Every format that was ever written loads; a checkpoint that does not fit says why."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import GOLDEN
from vllm_loopus.modeling.checkpoint import current_name
from vllm_loopus.modeling.model import LoopUSForCausalLM

SOURCE = GOLDEN / "qwen3"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return load_file(SOURCE / "model.safetensors")


def folder_with_config(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    shutil.copy(SOURCE / "config.json", path / "config.json")
    return path


def old_name(name: str) -> str:
    name = name.replace("reasoning.", "plateau.", 1)
    return name.replace("plateau.layers", "plateau.module.layers")


def assert_same(model: LoopUSForCausalLM, tensors: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_expected_shapes_are_the_checkpoint(tensors: dict[str, torch.Tensor]) -> None:
    config = LoopUSForCausalLM.config_class.from_pretrained(SOURCE)
    assert LoopUSForCausalLM.expected_shapes(config) == {
        name: t.shape for name, t in tensors.items()
    }


def test_old_names_safetensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    old = {old_name(name): tensor for name, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    assert {current_name(name) for name in old} == tensors.keys()
    save_file(old, folder_with_config(tmp_path) / "model.safetensors", metadata={"format": "pt"})
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tensors)


def test_combined_model_pt(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    old = {old_name(name): tensor for name, tensor in tensors.items()}
    torch.save(old, folder_with_config(tmp_path) / "combined_model.pt")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tensors)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"w": Path("x")}, folder_with_config(tmp_path) / "combined_model.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_sharded_round_trip(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tensors)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "misshapen"])
def test_wrong_tensors_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], problem: str
) -> None:
    name = "reasoning.gate.A_log"
    if problem == "missing":
        del tensors[name]
    elif problem == "unexpected":
        name = "reasoning.gate.B_log"
        tensors[name] = torch.ones(3)
    else:
        tensors[name] = torch.ones(7)
    save_file(
        tensors, folder_with_config(tmp_path) / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=rf"{problem}: .*{name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
