"""What differs between the base models a LoopUS model can be cut from.

Adding a backbone is one entry in `BACKBONES`, and a row in `tests/bases.py`. Classes are named as
`module:Class` and imported when first used, so that reading a config imports neither vLLM nor a
transformers model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal


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
    vllm_norm: str = "vllm.model_executor.layers.layernorm:RMSNorm"
    # Which layers attend inside `sliding_window`, where it is set: none, all, or those that
    # `layer_types` lists as sliding.
    windows: Literal["none", "all", "listed"] = "none"
    # The rotary embedding takes the layer type and gives each type a table of its own.
    rotary_by_layer_type: bool = False
    # Heads rotate a part of their channels where `partial_rotary_factor` says so.
    partial_rotary: bool = False
    # Embeddings are multiplied by sqrt(hidden_size).
    scaled_embedding: bool = False
    # Config fields of the caps on attention scores and logits (`cap * tanh(x / cap)`).
    attention_softcap: str | None = None
    logit_softcap: str | None = None
    # Config fields that only one side acts upon, and what switches them off.
    not_reproduced: Mapping[str, Any] = field(default_factory=dict)

    def value(self, base: Any, difference: str) -> Any:
        """What `base`, a config, holds in the field that `difference` names; None for no field."""
        name = getattr(self, difference)
        return None if name is None else getattr(base, name)


def load_class(path: str) -> Any:
    """The class that `path` (`module:Class`) names."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


_SPLIT = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_MERGED = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}
_GEMMA: dict[str, Any] = {
    "vllm_norm": "vllm.model_executor.layers.layernorm:GemmaRMSNorm",
    "windows": "listed",
    "scaled_embedding": True,
    "logit_softcap": "final_logit_softcapping",
}


def _backbone(
    model_type: str,
    name: str,
    vllm_layer: str,
    packed_modules: dict[str, list[str]] = _SPLIT,
    **differences: Any,
) -> Backbone:
    """`name` begins the names of the transformers classes, and is their module's in lower case."""
    module = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    return Backbone(
        model_type=model_type,
        hf_layer=f"{module}:{name}DecoderLayer",
        hf_norm=f"{module}:{name}RMSNorm",
        hf_rotary=f"{module}:{name}RotaryEmbedding",
        vllm_layer=f"vllm.model_executor.models.{vllm_layer}",
        packed_modules=packed_modules,
        **differences,
    )


BACKBONES: dict[str, Backbone] = {
    backbone.model_type: backbone
    for backbone in (
        _backbone(
            "qwen3",
            "Qwen3",
            "qwen3:Qwen3DecoderLayer",
            windows="listed",
            not_reproduced={"attention_bias": False},  # vLLM's output projection has none
        ),
        _backbone("qwen2", "Qwen2", "qwen2:Qwen2DecoderLayer", windows="listed"),
        _backbone("llama", "Llama", "llama:LlamaDecoderLayer"),
        _backbone("mistral", "Mistral", "llama:LlamaDecoderLayer", windows="all"),
        # Phi-4 is a "phi3" model; vLLM runs both on its Llama layers.
        _backbone(
            "phi3", "Phi3", "llama:LlamaDecoderLayer", _MERGED, windows="all", partial_rotary=True
        ),
        _backbone(
            "gemma2",
            "Gemma2",
            "gemma2:Gemma2DecoderLayer",
            attention_softcap="attn_logit_softcapping",
            **_GEMMA,
        ),
        _backbone(
            "gemma3_text",
            "Gemma3",
            "gemma3:Gemma3DecoderLayer",
            rotary_by_layer_type=True,
            **_GEMMA,
        ),
    )
}
