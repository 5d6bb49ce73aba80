"""What reference models made of a base model's layers share."""

import torch
from torch import nn
from transformers import initialization as init

from vllm_loopus.backbones import load_class
from vllm_loopus.base_config import ConfigWithBase
from vllm_loopus.modeling.layers import Positions
from vllm_loopus.modeling.looped_model import LoopedReference


class ReferenceWithBase(LoopedReference):
    """A looped model of the layers of a base model, which its config names."""

    config: ConfigWithBase
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ConfigWithBase) -> None:
        """A subclass adds its parts, and then calls `post_init`."""
        config.check()
        # SDPA does not support a cap on attention scores and would ignore it silently.
        self._supports_sdpa = config.attention.softcap is None
        super().__init__(config)
        # The layers read the attention implementation from the config they are built with.
        config.base._attn_implementation = config._attn_implementation
        self.rotary_emb = load_class(config.backbone.hf_rotary)(config=config.base)

    def _init_weights(self, module: nn.Module) -> None:
        backbone = self.config.backbone
        norm_class, rotary_class = load_class(backbone.hf_norm), load_class(backbone.hf_rotary)
        # Norms of a base model may scale by `1 + weight`, and the buffers of its rotary tables have
        # model-specific names, so copy the initial values from a new instance of its classes.
        if isinstance(module, norm_class):
            init.copy_(module.weight, norm_class(module.weight.numel()).weight)
        elif isinstance(module, rotary_class):
            with torch.device("cpu"):
                fresh = rotary_class(config=self.config.base)
            for name, table in fresh.named_buffers():
                init.copy_(module.get_buffer(name), table)
        else:
            super()._init_weights(module)

    def positions(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Positions:
        """Rotary tables and mask for hidden states [B, T, H]."""
        return Positions.build(self.config, self.rotary_emb, hidden, attention_mask, position_ids)
