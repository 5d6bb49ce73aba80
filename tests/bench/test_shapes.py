"""Models of other architectures for the benchmark: a checkpoint as its family has it."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_loopus.architectures import record_of
from vllm_loopus.architectures.ouro.record import OURO
from vllm_loopus.bench.models import SIZES, write_looped


def test_ouro(tmp_path: Path) -> None:
    """The gate's own exits are about as deep as asked for; weights are counted as they are."""
    size = SIZES["ouro-tiny"]
    threshold = write_looped(size, tmp_path / "looped", "float32", mean=2.0)
    config = AutoConfig.from_pretrained(tmp_path / "looped")
    assert record_of(config) is OURO and config.exit_threshold == 2.0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "looped", dtype=torch.float32)
    in_layers = sum(
        weight.numel() for name, weight in model.named_parameters() if name.endswith("proj.weight")
    )
    assert in_layers == size.reasoning_weights
    config.exit_threshold = threshold
    model.config.exit_threshold = threshold
    torch.manual_seed(0)
    depths = [model(ids[None]).exit_depths.item() for ids in torch.randint(10, 512, (24, 8))]
    assert 1.5 < sum(depths) / len(depths) < 2.5
    assert size.decoder_attends is False and size.looped_weights(2) > size.looped_weights(1)
