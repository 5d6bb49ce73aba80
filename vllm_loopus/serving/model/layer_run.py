"""Layers of a base model as vLLM has them, with the attention that the base's config asks for."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_loopus.backbones import load_class
from vllm_loopus.base_config import ConfigWithBase


class LayerRun(nn.Module):
    """A run of the base model's layers as vLLM has them; the base class of parts of models."""

    def __init__(self, vllm_config: VllmConfig, indices: Sequence[int], prefix: str) -> None:
        """`indices`: the layers of the base in this run."""
        super().__init__()
        config: ConfigWithBase = vllm_config.model_config.hf_config
        layer_class = load_class(config.backbone.vllm_layer)
        # vLLM's layers look up their type by their number, which counts inside the run here.
        base = copy.copy(config.base)
        base.layer_types = [config.attention.types[index] for index in indices]
        self.layers = nn.ModuleList()
        for number, index in enumerate(indices):
            # Layers that do not look it up take the window of the cache config.
            windowed = copy.copy(vllm_config)
            windowed.cache_config = copy.copy(vllm_config.cache_config)
            windowed.cache_config.sliding_window = config.attention.window(index)
            # vLLM's layers take either the whole vLLM config or the parts they need.
            offered = {
                "vllm_config": windowed,
                "config": base,
                "cache_config": windowed.cache_config,
                "quant_config": vllm_config.quant_config,
            }
            taken = inspect.signature(layer_class).parameters.keys() & offered.keys()
            arguments = {name: offered[name] for name in taken}
            self.layers.append(layer_class(**arguments, prefix=f"{prefix}.layers.{number}"))

    def run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and the residual still to be added, [T, H] each.

        Needs at least one layer, because vLLM's layers create the residual themselves.
        """
        residual: Any = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden, residual


class FirstLayers(LayerRun):
    """A run with the base model's embedding before it."""

    def __init__(self, vllm_config: VllmConfig, indices: Sequence[int], prefix: str) -> None:
        super().__init__(vllm_config, indices, prefix)
        config: ConfigWithBase = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.scale: torch.Tensor | None
        # In the model's dtype, the default one here: Gemma rounds the factor to it.
        scaled = config.backbone.scaled_embedding
        scale = torch.tensor(config.hidden_size**0.5) if scaled else None
        self.register_buffer("scale", scale, persistent=False)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> embedded tokens [T, H]."""
        embedded = self.embed_tokens(input_ids)
        return embedded if self.scale is None else embedded * self.scale
