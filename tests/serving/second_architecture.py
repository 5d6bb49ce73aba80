"""A further looped architecture, for the tests: all that a new one has to bring, in one module.

It is Ouro with two options that use the rest of the seam: `injects` (the embedding goes into every
pass again) and `reads_depth` (each pass adds a vector of its depth).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from vllm_loopus.architectures import Architecture, LoopLayers
from vllm_loopus.architectures.ouro import reference, vllm_model
from vllm_loopus.architectures.ouro.config import OuroConfig
from vllm_loopus.architectures.ouro.exit_rule import CumulativeRule
from vllm_loopus.modeling.looped_model import Pass
from vllm_loopus.serving.model.loading import load_checked
from vllm_loopus.serving.model.planes import Planes

NAME = "SecondLoopForCausalLM"
TINY = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "rope_theta": 1e6,
}  # fmt: skip


class SecondConfig(OuroConfig):
    model_type: ClassVar[str] = "second_loop"
    injects: bool = False
    reads_depth: bool = False


def add_options(body: nn.Module, config: SecondConfig) -> None:
    """The tensors of the options, under `model.` in the checkpoint."""
    size = config.hidden_size
    if config.injects:
        body.adapter = nn.Linear(2 * size, size, bias=False)
    if config.reads_depth:
        body.of_depth = nn.Embedding(config.total_ut_steps + 1, size)


class SecondReference(reference.OuroForCausalLM):
    """The transformers side, uncached."""

    config_class = SecondConfig

    def __init__(self, config: SecondConfig) -> None:
        super().__init__(config)
        add_options(self.model, config)
        self.post_init()

    def loop(self, embedded: torch.Tensor, positions: Any) -> Iterator[Pass]:
        state = embedded
        for depth in range(1, self.config.max_loops + 1):
            refined = state
            if self.config.injects:
                refined = self.model.adapter(torch.cat([refined, embedded], dim=-1))
            if self.config.reads_depth:
                refined = refined + self.model.of_depth.weight[depth]
            for layer in self.model.layers:
                refined = layer(refined, positions)
            refined = self.model.norm(refined)
            yield Pass(depth, state, refined)
            state = refined


class SecondLoopForCausalLM(vllm_model.OuroForCausalLM):
    """The vLLM side: `seam.LoopedModel`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        add_options(self.model, self.config)
        self.reads_depth = self.config.reads_depth

    def build_planes(self, vllm_config: Any) -> Planes:
        nothing, size = nn.Module(), self.config.hidden_size
        injected = size if self.config.injects else 0
        return Planes(nothing, self.model.layers, nothing, vllm_config, size, injected)

    def encode(self, input_ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        embedded = self.embed_input_ids(input_ids)
        return (embedded, embedded.clone()) if self.config.injects else (embedded,)

    def refine(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        depth: torch.Tensor | None = None,
        injected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if injected is not None:
            state = self.model.adapter(torch.cat([state, injected], dim=-1))
        if depth is not None:
            state = state + self.model.of_depth(depth)
        return super().refine(state, positions)

    def load_weights(self, weights: Any) -> set[str]:
        return load_checked(self, weights, SecondReference)


def _layers(config: SecondConfig) -> LoopLayers:
    return LoopLayers((), range(config.num_hidden_layers), (), injects=config.injects)


RECORD = Architecture(
    name=NAME,
    family="Second",
    config_class=SecondConfig,
    model=f"{__name__}:{NAME}",
    reference=f"{__name__}:SecondReference",
    exit_rule=CumulativeRule,
    layers=_layers,
)


def write_checkpoint(weights: Path, folder: Path, **fields: Any) -> Path:
    """A checkpoint of the architecture with Ouro's `weights`, and random ones for what it lacks."""
    AutoConfig.register(SecondConfig.model_type, SecondConfig, exist_ok=True)
    tensors = load_file(weights)
    torch.manual_seed(3)
    size = int(TINY["hidden_size"])
    if fields.get("injects"):
        tensors["model.adapter.weight"] = torch.randn(size, 2 * size) / size**0.5
    if fields.get("reads_depth"):
        tensors["model.of_depth.weight"] = torch.randn(fields["max_loops"] + 1, size)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": SecondConfig.model_type, "architectures": [NAME], **TINY, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
