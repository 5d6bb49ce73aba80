"""LoopUS (arXiv 2605.11011): a base model split into encoder, reasoning block and decoder."""

from vllm_loopus.architectures.record import LOOP_FIELDS, Architecture, LoopLayers
from vllm_loopus.config import ARCHITECTURE, LoopUSConfig
from vllm_loopus.modeling.halting import HaltingRule


def _layers(config: LoopUSConfig) -> LoopLayers:
    return LoopLayers(
        config.encoder_layer_indices, config.reasoning_layer_indices, config.decoder_layer_indices
    )


LOOPUS = Architecture(
    name=ARCHITECTURE,
    family="LoopUS",
    config_class=LoopUSConfig,
    model="vllm_loopus.serving.model.loopus:LoopUSForCausalLM",
    reference="vllm_loopus.modeling.model:LoopUSForCausalLM",
    exit_rule=HaltingRule,
    layers=_layers,
    served_fields=(*LOOP_FIELDS, "exit_interval", "convergence_epsilon", "confidence_input"),
    released_names={
        "N": "max_loops",
        "q_threshold": "exit_threshold",
        "q_eval_interval": "exit_interval",
    },
)
