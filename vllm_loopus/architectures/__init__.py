"""The looped architectures that can be served, one record each.

A new one is a module here with its `Architecture`, listed in `ARCHITECTURES`; a config class; a
vLLM model that satisfies `serving/model/seam.py`; and a reference model. Nothing else asks which
architecture a model has.
"""

from transformers import PreTrainedConfig

from vllm_loopus.architectures.loopus import LOOPUS
from vllm_loopus.architectures.record import Architecture, LoopedConfig, LoopLayers

__all__ = ["ARCHITECTURES", "Architecture", "LoopLayers", "LoopedConfig", "architecture_of"]

ARCHITECTURES: list[Architecture] = [LOOPUS]


def architecture_of(config: PreTrainedConfig | None) -> Architecture | None:
    """The record of the architecture that a config belongs to; None for a model without a loop."""
    for architecture in ARCHITECTURES:
        if isinstance(config, architecture.config_class):
            return architecture
    return None
