"""`LoopUSConfig`: both formats, overrides, and clear refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.bases import BASES, WINDOW, base_config
from tests.conftest import BACKBONES, GOLDEN
from vllm_loopus.backbones import BACKBONES as SUPPORTED
from vllm_loopus.base_attention import FULL
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


def on(model_type: str, **changes: Any) -> LoopUSConfig:
    """A LoopUS config on a row of the table of bases, with changes to the base's config."""
    base = {**base_config(model_type).to_dict(), **changes}
    return LoopUSConfig(base_config=base, reasoning_layer_indices=[0, 1, 2, 3])


def test_every_backbone_has_a_base() -> None:
    assert BASES.keys() == SUPPORTED.keys()


@pytest.mark.parametrize("model_type", BASES)
def test_every_base_round_trip(model_type: str, tmp_path: Path) -> None:
    config = LoopUSConfig(base_config=base_config(model_type), reasoning_layer_indices=[0, 1, 2, 3])
    assert config.base.tie_word_embeddings is False
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.base.model_type == model_type
    assert again.base.tie_word_embeddings is False
    assert again.base.to_dict() == config.base.to_dict() == on(model_type).base.to_dict()


WINDOWS = {
    "qwen3": [None] * 4,
    "qwen2": [None, None, WINDOW, WINDOW],
    "llama": [None] * 4,
    "mistral": [WINDOW] * 4,
    "phi3": [WINDOW] * 4,
    "gemma2": [WINDOW, None] * 2,
    "gemma3_text": [WINDOW, None] * 2,
}


@pytest.mark.parametrize("model_type", BASES)
def test_windows(model_type: str) -> None:
    config = on(model_type)
    assert [config.attention.window(layer) for layer in range(4)] == WINDOWS[model_type]
    config.base.sliding_window = None
    config.check()
    assert [config.attention.window(layer) for layer in range(4)] == [None] * 4


BAD_BASES = [
    ("phi3", {"sliding_window": 0}, "sliding_window=0 must be a number of positions, or null"),
    ("llama", {"sliding_window": 128}, "sliding_window=128 has no effect in a llama model"),
    ("mistral", {"layer_types": [FULL] * 4}, "layer_types=.* does not match the layers"),
    ("gemma3_text", {"layer_types": ["chunked_attention"] * 4}, "layer_types contains .*chunked"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("llama", {"is_causal": False}, "is_causal=False .* set it to True"),
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config="),
    ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), BAD_BASES)
def test_bases_that_are_refused(model_type: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on(model_type, **changes)
