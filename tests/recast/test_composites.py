"""Multimodal wrappers, as transformers saves them: their text part loops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

from tests.bases import base_config
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.convert import recast
from vllm_loopus.recast.hidden_states import HiddenStates

# As many layers as the text part: the analysis must not take one for the other.
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3() -> Any:
    # The wrapper has no cap on logits, nor have published models.
    text = base_config("gemma3_text", final_logit_softcapping=None).to_dict()
    vision = {"model_type": "siglip_vision_model", **VISION}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    vision = {"model_type": "clip_vision_model", **VISION}
    text = base_config("llama").to_dict()
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))


def mistral3() -> Any:
    vision = {"model_type": "pixtral", **VISION}
    text = base_config("mistral").to_dict()
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


@pytest.mark.parametrize("build", [gemma3, llava, mistral3])
@torch.no_grad()
def test_one_open_loop_is_the_text_part(build: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")
    base = Base.open(str(tmp_path / "base"))
    assert base.left_out and not any("embed_tokens" in name for name in base.left_out)
    recast(base, tmp_path / "looped", encoder=1, decoder=1, max_loops=1)
    looped = AutoModelForCausalLM.from_pretrained(tmp_path / "looped", dtype=torch.float32)
    looped.reasoning.gate.delta_proj.bias.fill_(-100)
    whole = type(build()).from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(2, 100, (1, 30))
    expected = whole(input_ids=ids).logits
    torch.testing.assert_close(looped(ids).logits, expected, atol=1e-4, rtol=0)

    cpu = torch.device("cpu")
    streamed = HiddenStates(base, cpu, torch.float32).states(ids)
    kept = HiddenStates(base, cpu, torch.float32, device_map="cpu").states(ids)
    torch.testing.assert_close(streamed, kept, atol=1e-5, rtol=0)
