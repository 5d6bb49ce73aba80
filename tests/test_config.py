"""`LoopUSConfig`: both formats, overrides, and clear refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.conftest import BACKBONES, GOLDEN
from vllm_loopus.config import LoopUSConfig


def released(**changes: Any) -> dict[str, Any]:
    """The golden Qwen3 config as it lies on disk, with changes."""
    fields = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    return {**fields, **changes}


def build(**changes: Any) -> LoopUSConfig:
    fields = released(**changes)
    fields.pop("model_type")
    return LoopUSConfig(**fields)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_reads_the_released_format(backbone: str) -> None:
    on_disk = json.loads((GOLDEN / backbone / "config.json").read_text())
    config = AutoConfig.from_pretrained(GOLDEN / backbone)
    assert isinstance(config, LoopUSConfig)
    assert config.architectures == ["LoopUSForCausalLM"]
    assert (config.max_loops, config.exit_threshold) == (8, on_disk["q_threshold"])
    assert config.exit_interval == on_disk["q_eval_interval"]
    assert config.base.model_type == backbone
    assert config.get_text_config().num_hidden_layers == 6


def test_own_format_round_trip(tmp_path: Path) -> None:
    config = build(N=5, q_threshold=0.7)
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["model_type"] == "loopus"
    assert on_disk["max_loops"] == 5
    assert "N" not in on_disk
    again = AutoConfig.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == on_disk


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ({"N": 3}, "max_loops", 3),
        ({"max_loops": 3}, "max_loops", 3),
        ({"q_threshold": 1.5}, "exit_threshold", 1.5),
        ({"exit_interval": 2}, "exit_interval", 2),
        ({"halting_strategy": "cdf"}, "halting_strategy", "cdf"),
    ],
)
def test_overrides_under_both_names(override: dict, field: str, value: Any) -> None:
    config = build()
    config.update(override)
    config.check()
    assert getattr(config, field) == value


def test_the_decoder_never_shares_the_embedding() -> None:
    base = {**released()["base_config_dict"], "tie_word_embeddings": True}
    assert build(base_config_dict=base).base.tie_word_embeddings is False


BAD = [
    ({"N": 0}, "max_loops=0"),
    ({"N": -2}, "max_loops=-2"),
    ({"N": True}, "max_loops=True"),
    ({"N": "8"}, "max_loops='8'"),
    ({"N": 10**6}, "max_loops=1000000"),
    ({"min_loops": 0}, "min_loops=0"),
    ({"min_loops": 9}, "min_loops=9"),
    ({"q_threshold": float("nan")}, "exit_threshold=nan"),
    ({"q_threshold": -0.1}, "exit_threshold=-0.1"),
    ({"q_eval_interval": 0}, "exit_interval=0"),
    ({"convergence_epsilon": -1.0}, "convergence_epsilon=-1.0"),
    ({"halting_strategy": "vote"}, "halting_strategy='vote'"),
    ({"confidence_input": "logits"}, "confidence_input='logits'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"reasoning_layer_indices": []}, "reasoning_layer_indices=\\[\\]"),
    ({"decoder_layer_indices": [6]}, "decoder_layer_indices=\\[6\\].*0..5"),
    ({"encoder_layer_indices": [-1]}, "encoder_layer_indices=\\[-1\\]"),
    ({"encoder_layer_indices": [0, 1]}, "layer 1 is in both encoder_layer_indices and reasoning"),
    ({"decoder_layer_indices": [5, 5]}, "layer 5 is in both"),
    ({"reasoning_layer_indices": [2, 1, 3, 4]}, "out of order"),
    ({"reasoning_layer_indices": "1234"}, "reasoning_layer_indices='1'"),
    ({"base_config_dict": {"model_type": "gpt2"}}, "base_config.model_type='gpt2'.*qwen3"),
    ({"base_config_dict": {}}, "base_config.model_type=None"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: str(value)[:40])
def test_refusals_name_field_and_value(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_checkpoint_without_its_base(tmp_path: Path) -> None:
    fields = released()
    del fields["base_config_dict"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="base_config is missing"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [2047, 128])
def test_sliding_windows_are_refused(value: int) -> None:
    phi = json.loads((GOLDEN / "phi3" / "config.json").read_text())
    phi["base_config_dict"]["sliding_window"] = value
    with pytest.raises(ValueError, match=f"sliding_window={value}"):
        LoopUSConfig.from_dict(phi)
