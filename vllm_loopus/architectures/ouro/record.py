"""The record of Ouro."""

from vllm_loopus.architectures.ouro.config import ARCHITECTURE, OuroConfig
from vllm_loopus.architectures.ouro.exit_rule import CumulativeRule
from vllm_loopus.architectures.record import LOOP_FIELDS, Architecture, LoopLayers


def _layers(config: OuroConfig) -> LoopLayers:
    return LoopLayers((), range(config.num_hidden_layers), ())


OURO = Architecture(
    name=ARCHITECTURE,
    family="Ouro",
    config_class=OuroConfig,
    model="vllm_loopus.architectures.ouro.vllm_model:OuroForCausalLM",
    reference="vllm_loopus.architectures.ouro.reference:OuroForCausalLM",
    exit_rule=CumulativeRule,
    layers=_layers,
    served_fields=(*LOOP_FIELDS, "early_exit_step"),
    released_names={"total_ut_steps": "max_loops", "early_exit_threshold": "exit_threshold"},
)
