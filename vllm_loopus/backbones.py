"""What differs between the base models a LoopUS model can be cut from.

Adding a backbone is one entry in `BACKBONES`. Classes are named as `module:Class` and imported when
first used, so that reading a config imports neither vLLM nor a transformers model.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Backbone:
    """One base architecture, keyed by the `model_type` of its transformers config."""

    model_type: str
    hf_layer: str
    hf_norm: str
    hf_rotary: str
    vllm_layer: str
    # vLLM's merged linear layers and the checkpoint's own layers they hold, in order.
    packed_modules: dict[str, list[str]]


def load_class(path: str) -> Any:
    """The class that `path` (`module:Class`) names."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


_SPLIT = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_MERGED = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}


def _backbone(
    model_type: str, name: str, vllm_layer: str, packed_modules: dict[str, list[str]]
) -> Backbone:
    module = f"transformers.models.{model_type}.modeling_{model_type}"
    return Backbone(
        model_type=model_type,
        hf_layer=f"{module}:{name}DecoderLayer",
        hf_norm=f"{module}:{name}RMSNorm",
        hf_rotary=f"{module}:{name}RotaryEmbedding",
        vllm_layer=f"vllm.model_executor.models.{vllm_layer}",
        packed_modules=packed_modules,
    )


BACKBONES: dict[str, Backbone] = {
    backbone.model_type: backbone
    for backbone in (
        _backbone("qwen3", "Qwen3", "qwen3:Qwen3DecoderLayer", _SPLIT),
        _backbone("llama", "Llama", "llama:LlamaDecoderLayer", _SPLIT),
        # Phi-4 is a "phi3" model; vLLM runs both on its Llama layers.
        _backbone("phi3", "Phi3", "llama:LlamaDecoderLayer", _MERGED),
    )
}
