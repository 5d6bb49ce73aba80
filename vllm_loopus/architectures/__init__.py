"""The looped architectures that can be served, with one `Architecture` record each.

Each has a folder here: `config.py`, `reference.py` (for transformers), `vllm_model.py` (implements
`serving/model/seam.py`; imported when a model is served, by the name in the record) and
`record.py`, listed in `ARCHITECTURES`. Nothing else depends on the architecture of a model. LoopUS,
which recasting and training are about, has its parts in `config.py`, `modeling/` and
`serving/model/loopus.py` of the package.
"""

from pkgutil import resolve_name

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from vllm_loopus.architectures.loopus import LOOPUS
from vllm_loopus.architectures.ouro.record import OURO
from vllm_loopus.architectures.raven.record import RAVEN
from vllm_loopus.architectures.record import Architecture, LoopedConfig, LoopLayers
from vllm_loopus.architectures.recursive.record import RECURSIVE

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "LoopLayers",
    "LoopedConfig",
    "architecture_of",
    "record_of",
    "register",
]

ARCHITECTURES: list[Architecture] = [LOOPUS, OURO, RAVEN, RECURSIVE]


def architecture_of(config: PreTrainedConfig | None) -> Architecture | None:
    """The record for a config; None for a model without a loop."""
    for architecture in ARCHITECTURES:
        if isinstance(config, architecture.config_class):
            return architecture
    return None


def record_of(config: PreTrainedConfig) -> Architecture:
    """The record for the config of a looped model. Raises `ValueError` for another model."""
    architecture = architecture_of(config)
    if architecture is None:
        families = ", ".join(architecture.family for architecture in ARCHITECTURES)
        raise ValueError(
            f"a {config.model_type} model, not a LoopUS model or another one whose loop is known "
            f"here ({families})"
        )
    return architecture


def register() -> None:
    """Registers configs and reference models with transformers. May be called repeatedly."""
    for architecture in ARCHITECTURES:
        config_class = architecture.config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        if architecture.reference is not None:
            model = resolve_name(architecture.reference)
            AutoModelForCausalLM.register(config_class, model, exist_ok=True)
