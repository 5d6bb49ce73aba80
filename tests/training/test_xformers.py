"""xformers' attention for packed rows: its mask and shapes here, its kernels only on CUDA."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from tests.bases import base_config
from tests.training.conftest import random_loopus
from vllm_loopus.training import xformers_attention
from vllm_loopus.training.settings import SettingsError


def test_document_lengths() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
    assert xformers_attention.document_lengths(positions) == [3, 2, 1, 4, 2]


def test_refused_without_package_or_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(SettingsError, match="use attention: sdpa"):
        xformers_attention.register(base_config("qwen3"))


def test_masks_and_shapes(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel replaced by what its mask, materialised, means: the model as with sdpa."""
    ops = pytest.importorskip("xformers.ops")

    def attend(q: Any, k: Any, v: Any, attn_bias: Any, p: float, scale: float) -> torch.Tensor:
        mask = attn_bias.materialize((q.shape[1], k.shape[1]))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", attend)
    AttentionInterface.register(xformers_attention.NAME, xformers_attention.xformers_attention)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    model = random_loopus(exit_threshold=1.0).eval()
    expected = model(**inputs).logits
    model.set_attn_implementation(xformers_attention.NAME)
    found = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
