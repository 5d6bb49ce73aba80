"""The record of relaxed recursive transformers."""

from vllm_loopus.architectures.record import Architecture, LoopLayers
from vllm_loopus.architectures.recursive.config import ARCHITECTURE, RecursiveConfig
from vllm_loopus.modeling.fixed_depth import FixedDepth


def _layers(config: RecursiveConfig) -> LoopLayers:
    return LoopLayers((), range(config.block_size), ())


RECURSIVE = Architecture(
    name=ARCHITECTURE,
    family="Recursive transformer",
    config_class=RecursiveConfig,
    model="vllm_loopus.architectures.recursive.vllm_model:RecursiveForCausalLM",
    reference="vllm_loopus.architectures.recursive.reference:RecursiveForCausalLM",
    exit_rule=FixedDepth,
    layers=_layers,
)
