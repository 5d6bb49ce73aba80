"""The looped architectures that can be served, with one `Architecture` record each.

To add one, write a config class, a vLLM model that implements `serving/model/seam.py` and a
reference model, and add a module here with its record, listed in `ARCHITECTURES`. No other code
depends on the architecture of a model.
"""

from transformers import PreTrainedConfig

from vllm_loopus.architectures.loopus import LOOPUS
from vllm_loopus.architectures.record import Architecture, LoopedConfig, LoopLayers

__all__ = ["ARCHITECTURES", "Architecture", "LoopLayers", "LoopedConfig", "architecture_of"]

ARCHITECTURES: list[Architecture] = [LOOPUS]


def architecture_of(config: PreTrainedConfig | None) -> Architecture | None:
    """The record for a config; None for a model without a loop."""
    for architecture in ARCHITECTURES:
        if isinstance(config, architecture.config_class):
            return architecture
    return None
