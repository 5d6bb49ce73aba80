"""The base models that a LoopUS model can be made from, and the differences between them.

To add a backbone, add an entry to `BACKBONES` and to `tests/bases.py`. Classes are given as
`module:Class` and imported when first used, so that reading a config imports neither vLLM nor a
transformers model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True)
class Backbone:
    """One base architecture, identified by the `model_type` of its transformers config."""

    model_type: str
    hf_layer: str
    hf_norm: str
    hf_rotary: str
    vllm_layer: str
    # vLLM's merged linear layers, and the checkpoint's layers that each contains, in order.
    packed_modules: dict[str, list[str]]
    vllm_norm: str = "vllm.model_executor.layers.layernorm:RMSNorm"
    # Which layers use `sliding_window` if it is set: none, all, or those that `layer_types` lists
    # as sliding.
    windows: Literal["none", "all", "listed"] = "none"
    # The rotary embedding has a separate table for each layer type.
    rotary_by_layer_type: bool = False
    # `partial_rotary_factor` is supported: heads may rotate only some of their channels.
    partial_rotary: bool = False
    # Embeddings are multiplied by sqrt(hidden_size).
    scaled_embedding: bool = False
    # Config fields of the caps on attention scores and logits (`cap * tanh(x / cap)`).
    attention_softcap: str | None = None
    logit_softcap: str | None = None
    # Config fields that only one side implements, and the values that disable them.
    not_reproduced: Mapping[str, Any] = field(default_factory=dict)

    def value(self, base: Any, difference: str) -> Any:
        """The value in the config `base` of the field that `difference` names; None without one."""
        name = getattr(self, difference)
        return None if name is None else getattr(base, name)


def load_class(path: str) -> Any:
    """Imports the class given as `module:Class`."""
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
    """`name`: the prefix of the transformers class names; in lower case, their module's name."""
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
            not_reproduced={"attention_bias": False},  # vLLM's output projection has no bias
        ),
        _backbone("qwen2", "Qwen2", "qwen2:Qwen2DecoderLayer", windows="listed"),
        _backbone("llama", "Llama", "llama:LlamaDecoderLayer"),
        _backbone("mistral", "Mistral", "llama:LlamaDecoderLayer", windows="all"),
        # Phi-4 also has model_type "phi3"; vLLM uses its Llama layers for both.
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
