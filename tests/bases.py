"""A small random base model for every backbone: one row each.

Rows carry what is particular to the family, so that a part left out shows: biases, windows shorter
than the prompts of the tests, scaled rotary tables, caps low enough to bite.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_loopus.tiny.tokenizer import build_tokenizer

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW = 12
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
GEMMA = {
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 20,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
# By model_type: the transformers model and config, and fields of the config.
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
            },
        },
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
            },
        },
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"head_dim": 64, "sliding_window": WINDOW}),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "num_attention_heads": 1,
            "sliding_window": WINDOW,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.05 * i for i in range(24)],
                "long_factor": [2.0 + 0.1 * i for i in range(24)],
            },
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, "attn_logit_softcapping": 0.5}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}


def base_config(model_type: str, **changes: Any) -> Any:
    """The config of a row of the table."""
    _, config_class, fields = BASES[model_type]
    return getattr(transformers, config_class)(**{**SIZES, **fields, **changes})


def save_base(model_type: str, folder: Path, seed: int = 1, **changes: Any) -> None:
    """A random model, norms and biases included, and a tokenizer; `changes` are to its config."""
    torch.manual_seed(seed)
    model = getattr(transformers, BASES[model_type][0])(base_config(model_type, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def load_base(folder: Path) -> Any:
    """The base as transformers runs it: "eager" knows every feature."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
