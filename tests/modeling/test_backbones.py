"""What a backbone brings along beyond its layers, on the transformers side."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.bases import BASES, WINDOW, base_config
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.model import LoopUSForCausalLM


def fresh(model_type: str, **options: object) -> LoopUSForCausalLM:
    torch.manual_seed(2)
    config = LoopUSConfig(
        base_config=base_config(model_type),
        encoder_layer_indices=[0],
        reasoning_layer_indices=[1, 2],
        decoder_layer_indices=[3],
        max_loops=2,
    )
    return AutoModelForCausalLM.from_config(config, **options)


@pytest.mark.parametrize("model_type", BASES)
def test_fresh_norms_scale_by_one(model_type: str) -> None:
    norm = fresh(model_type).decoder.norm
    torch.testing.assert_close(norm(torch.full((1, 64), 3.0)), torch.ones(1, 64), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("model_type", BASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model_type: str, side: str) -> None:
    """Windows count valid positions, with rows of other lengths in the batch."""
    model = fresh(model_type)
    short, long = torch.randint(2, 128, (WINDOW + 5,)), torch.randint(2, 128, (2 * WINDOW,))
    padding = torch.zeros(len(long) - len(short), dtype=torch.long)
    parts = [padding, short] if side == "left" else [short, padding]
    valid = torch.cat([(part > 0).long() for part in parts])
    batch = model(
        torch.stack([torch.cat(parts), long]),
        attention_mask=torch.stack([valid, torch.ones_like(long)]),
    )
    alone = model(short[None])
    torch.testing.assert_close(batch.logits[0, valid.bool()], alone.logits[0])
    torch.testing.assert_close(batch.logits[1], model(long[None]).logits[0])


def test_sdpa_would_leave_the_cap_out() -> None:
    assert fresh("gemma2").config.base._attn_implementation == "eager"
    assert fresh("qwen2").config.base._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r'attn_implementation="eager"'):
        fresh("gemma2", attn_implementation="sdpa")
