"""The model that is measured, with random weights, and the base that it is cut from."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_loopus.aliases import CHECKPOINTS
from vllm_loopus.modeling.checkpoint import TOKENIZER_FILES
from vllm_loopus.modeling.looped_model import LoopedReference

FIRST_TOKEN = 10  # the least id in prompts: lower ones are special in the borrowed tokenizer
SAMPLED_TEXTS, SAMPLED_LENGTH = 32, 12  # what the exit threshold is chosen on


@dataclass(frozen=True)
class ModelSize:
    """A Qwen3 base with one layer each in encoder and decoder. Sizes are numbers of elements.

    `published` is the size that the project's speed figures are asked for; `tiny` is for trying the
    benchmark itself.
    """

    layers: int = 12
    hidden: int = 1024
    intermediate: int = 3072
    heads: int = 16
    kv_heads: int = 8
    head_size: int = 64
    vocabulary: int = 32000
    max_loops: int = 8
    longest: int = 8192

    # Of the exit head, in the checkpoint; and whether the decoder has K/V.
    exit_head: ClassVar[str] = "q_head.1.weight"
    decoder_attends: ClassVar[bool] = True
    left_out: ClassVar[tuple[str, ...]] = ()  # sections of the report that are about LoopUS alone

    def base_config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.longest,
            "tie_word_embeddings": False,
        }

    def config(self) -> dict[str, Any]:
        """In the released format, which the original reads too. No token exits early unless
        asked to."""
        return {
            "model_type": "lds",
            "architectures": ["LoopUSForCausalLM"],
            "base_model_name_or_path": "random",
            "base_config_dict": self.base_config(),
            "encoder_layer_indices": [0],
            "reasoning_layer_indices": list(range(1, self.layers - 1)),
            "decoder_layer_indices": [self.layers - 1],
            "N": self.max_loops,
            "q_threshold": 2.0,
            "halting_strategy": "cdf",
        }

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def gate_weights(self) -> int:
        return 2 * self.hidden * (-(-self.hidden // 16))

    @property
    def reasoning_weights(self) -> int:
        """Weights that one pass multiplies a row with."""
        return (self.layers - 2) * self.layer_weights + self.gate_weights

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def base_weights(self) -> int:
        """What the base multiplies a row with, the LM head included; embedding is a look-up."""
        return self.layers * self.layer_weights + self.head_weights

    def looped_weights(self, depth: float) -> float:
        """The same of the looped model at a depth."""
        return 2 * self.layer_weights + depth * self.reasoning_weights + self.head_weights

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class OuroSize(ModelSize):
    """Shaped like Ouro: every layer is in the loop, no K/V head is shared. Its base is a Llama."""

    kv_heads: int = 16
    max_loops: int = 4

    exit_head: ClassVar[str] = "model.early_exit_gate.weight"
    decoder_attends: ClassVar[bool] = False
    left_out: ClassVar[tuple[str, ...]] = ("cache", "uneven", "quality")

    def base_config(self) -> dict[str, Any]:
        return {
            **super().base_config(),
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
        }

    def config(self) -> dict[str, Any]:
        return {
            **super().base_config(),
            "model_type": "ouro",
            "architectures": ["OuroForCausalLM"],
            "total_ut_steps": self.max_loops,
            "early_exit_threshold": 2.0,
        }

    @property
    def reasoning_weights(self) -> int:
        return self.layers * self.layer_weights

    def looped_weights(self, depth: float) -> float:
        return depth * self.reasoning_weights + self.head_weights


SIZES = {
    "published": ModelSize(),
    "small": ModelSize(layers=6, hidden=512, intermediate=1536, heads=8, kv_heads=4),
    "tiny": ModelSize(4, 128, 256, heads=4, kv_heads=2, head_size=32, vocabulary=512),
    "ouro": OuroSize(),
    "ouro-small": OuroSize(hidden=512, intermediate=1536, heads=8, kv_heads=8),
    "ouro-tiny": OuroSize(4, 128, 256, heads=4, kv_heads=4, head_size=32, vocabulary=512),
}


def write_config(config: Mapping[str, Any], folder: Path) -> Path:
    """A new model folder without weights: engines make up random ones. Returns the folder.

    Raises `FileExistsError` where it exists.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_looped(size: ModelSize, folder: Path, dtype: str, mean: float, seed: int = 0) -> float:
    """A checkpoint with seeded random weights and a tokenizer; returns an exit threshold.

    With that threshold the head lets tokens exit at a depth of about `mean`, on average. The
    threshold of the config lets no token exit early, as most runs want it.

    Raises `FileExistsError` where the folder exists.
    """
    write_config(size.config(), folder)
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        # A random head has about the same confidence in a token at all depths: by `threshold`
        # tokens would exit at once or never. By `cdf` they exit at all depths, where confidence is
        # low enough.
        weight = model.get_parameter(size.exit_head)
        weight.normal_(0, 1 / size.hidden**0.5)
    model = model.to(getattr(torch, dtype)).eval()
    threshold = _threshold(model, mean, seed)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (file := CHECKPOINTS / "loopus-tiny" / name).exists():
            shutil.copy(file, folder)
    return threshold


@torch.inference_mode()
def _threshold(model: LoopedReference, mean: float, seed: int) -> float:
    """The threshold at which positions of random texts exit at `mean` on average."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(
        FIRST_TOKEN,
        model.config.vocab_size,
        (SAMPLED_TEXTS, SAMPLED_LENGTH),
        generator=generator,
    )
    embedded = model.embed(ids)
    positions = model.positions(embedded)
    everywhere = (slice(None), slice(None))
    found = [
        model.exit_values(one, positions, everywhere)["confidence"].flatten().numpy()
        for one in model.loop(embedded, positions)
    ]
    reached = 1 - np.cumprod(1 - np.stack(found), axis=0)  # [N, positions]
    candidates = np.unique(reached.round(6))
    return float(min(candidates, key=lambda each: abs(_mean(reached, each) - mean)))


def _mean(reached: NDArray[np.float32], threshold: float) -> float:
    """The mean exit depth. `reached` [N, positions]: the evidence at each depth."""
    exited = reached > threshold
    exited[-1] = True
    return float((exited.argmax(0) + 1).mean())
