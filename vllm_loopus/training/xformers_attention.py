"""Attention of packed sequences with xformers on CUDA, registered in transformers as `xformers`.

The documents of a packed sequence attend only to themselves, without a mask [T, T]. The result is
the same as with sdpa, the default.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface

from vllm_loopus.base_config import ConfigWithBase
from vllm_loopus.training.settings import SettingsError

NAME = "xformers"


def document_lengths(position_ids: torch.Tensor) -> list[int]:
    """Lengths of all documents in position ids [B, T], in order. Each document starts at 0."""
    starts = position_ids == 0
    starts[:, 0] = True
    begins = starts.flatten().nonzero().flatten()
    ends = torch.cat([begins[1:], begins.new_tensor([position_ids.numel()])])
    return (ends - begins).tolist()


def block_mask(lengths: Sequence[int]) -> Any:
    """xformers' causal mask for documents of these lengths."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    return BlockDiagonalCausalMask.from_seqlens(list(lengths))


class _Masks:
    """Caches the mask of the last position ids, which all layers and passes of a batch share."""

    def __init__(self) -> None:
        self._of: Any = lambda: None
        self._mask: Any = None

    def get(self, position_ids: torch.Tensor) -> Any:
        if self._of() is not position_ids:
            self._of = weakref.ref(position_ids)
            self._mask = block_mask(document_lengths(position_ids))
        return self._mask


_masks = _Masks()


def xformers_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Implements transformers' attention interface: query [B, heads, T, D] -> [B, T, heads, D]."""
    from xformers.ops import memory_efficient_attention

    assert position_ids is not None
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    flat = (x.transpose(1, 2).reshape(1, batch * length, heads, size) for x in (query, key, value))
    attended = memory_efficient_attention(
        *flat, attn_bias=_masks.get(position_ids), p=dropout, scale=scaling
    )
    return attended.view(batch, length, heads, size), None


def register(config: Any) -> None:
    """Registers the attention with transformers, after a check that a model can use it.

    Raises `SettingsError` without xformers or CUDA, and for base models whose attention has a
    sliding window or a cap.
    """
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "attention: xformers is not installed; pip install 'vllm-loopus[xformers]', or use "
            "attention: sdpa"
        ) from error
    if not torch.cuda.is_available():
        raise SettingsError("attention: xformers has kernels for CUDA only; use attention: sdpa")
    base = config.base if isinstance(config, ConfigWithBase) else config
    windowed = getattr(base, "sliding_window", None) is not None
    capped = getattr(base, "attn_logit_softcapping", None) is not None
    if windowed or capped:
        raise SettingsError(
            f"attention: xformers does not support the sliding window or cap of this "
            f"{base.model_type} model; use attention: eager"
        )
    AttentionInterface.register(NAME, xformers_attention)
