"""Attention heads of a size that the attention kernels lack: zeros fill them up.

vLLM's CPU kernels have heads of 32 and more. Zeros change neither scores nor sums, so answers are
those of the model's own heads; K/V takes the room of the larger ones.
"""

from typing import Any

import torch
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform


def stored_head_size(head_size: int) -> int:
    """The size in which heads of `head_size` numbers are computed and stored here."""
    if not current_platform.is_cpu():
        return head_size
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes = CPUAttentionBackend.get_supported_head_sizes()
    return min((size for size in sizes if size >= head_size), default=head_size)


def pad_heads(layer: Any, vllm_config: VllmConfig) -> None:
    """Replaces the `attn` of one of vLLM's attention layers, if its heads have to be padded.

    `layer` has `attn` and `scaling`, as `LlamaAttention` and its kind do.
    """
    attn: Attention = layer.attn
    if stored_head_size(attn.head_size) == attn.head_size:
        return
    del vllm_config.compilation_config.static_forward_context[attn.layer_name]
    layer.attn = PaddedAttention(
        attn.num_heads,
        attn.head_size,
        layer.scaling,
        num_kv_heads=attn.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=attn.quant_config,
        per_layer_sliding_window=attn.sliding_window,
        prefix=attn.layer_name,
    )


class PaddedAttention(Attention):
    """vLLM's `Attention` with heads that are larger than the model's by zeros."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **options: Any) -> None:
        """`head_size`, `scale`: the model's."""
        super().__init__(num_heads, stored_head_size(head_size), scale, **options)
        self.model_head_size = head_size

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        """Rows [T, heads * head_size] of the model's size in and out."""
        padded = (self._padded(rows) for rows in (query, key, value))
        output: torch.Tensor = super().forward(*padded, *rest)
        heads = output.unflatten(-1, (-1, self.head_size))
        return heads[..., : self.model_head_size].flatten(1)

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        heads = rows.unflatten(-1, (-1, self.model_head_size))
        return F.pad(heads, (0, self.head_size - self.model_head_size)).flatten(1)
