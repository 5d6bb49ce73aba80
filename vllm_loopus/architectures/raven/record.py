"""The record of the recurrent-depth models."""

from vllm_loopus.architectures.raven.config import ARCHITECTURE, RavenConfig
from vllm_loopus.architectures.raven.criteria import CriterionRule
from vllm_loopus.architectures.raven.initial_state import NOISE, ZEROS, load_table
from vllm_loopus.architectures.record import Architecture, LoopLayers


def _layers(config: RavenConfig) -> LoopLayers:
    prelude = config.n_layers_in_prelude
    coda = prelude + config.n_layers_in_recurrent_block
    return LoopLayers(
        range(prelude), range(prelude, coda), range(coda, config.n_blocks), injects=True
    )


def _first_state(config: RavenConfig, chosen: str | None) -> int | None:
    if chosen in (None, NOISE, ZEROS):
        return None
    return len(load_table(chosen, config.n_embd))


RAVEN = Architecture(
    name=ARCHITECTURE,
    family="Recurrent depth",
    config_class=RavenConfig,
    model="vllm_loopus.architectures.raven.vllm_model:RavenForCausalLM",
    reference="vllm_loopus.architectures.raven.reference:RavenForCausalLM",
    exit_rule=CriterionRule,
    layers=_layers,
    released_names={"mean_recurrence": "max_loops", "num_steps": "max_loops"},
    settle=RavenConfig.settle,
    variant=lambda config: config.family.title,
    first_state=_first_state,
)
