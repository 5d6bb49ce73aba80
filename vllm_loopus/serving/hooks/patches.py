"""The functions of vLLM that we replace. `patches/catalogue.toml` has the reasons, and what a user
would lose without each.

A patch wraps one function and calls the original, except for looped models and redirected names. It
is applied once in each process. If the function is missing in vLLM or has other parameters, the
start fails. If vLLM already has what the patch's diff proposes, the patch is not applied.
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from vllm_loopus.aliases import explain_unknown_alias
from vllm_loopus.architectures import architecture_of
from vllm_loopus.serving.frontend.answers import explain_failure
from vllm_loopus.serving.messages.exit_depths import attach

logger = logging.getLogger("vllm.loopus")

MARK = "_vllm_loopus_patch"


@dataclass(frozen=True)
class Patch:
    """Replaces the function `name` (or `Class.name`) of `module`. `wrap` takes the original."""

    key: str  # its entry in patches/catalogue.toml
    module: str
    name: str
    parameters: tuple[str, ...]  # "..." at the end: more may follow, which `wrap` passes through
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    obsolete: Callable[[], bool]  # whether this vLLM has what the diff proposes

    def apply(self) -> None:
        """Idempotent. Raises `RuntimeError` if vLLM no longer has what is replaced."""
        if self.obsolete():
            logger.info("vllm-loopus: %s not applied: this vLLM already has the feature", self.key)
            return
        target: Any = importlib.import_module(self.module)
        *owners, name = self.name.split(".")
        for owner in owners:
            target = getattr(target, owner, None)
        original = getattr(target, name, None)
        if getattr(original, MARK, None) == self.key:
            return
        where = f"{self.module}.{self.name}"
        if original is None:
            raise RuntimeError(f"vllm-loopus: {where} is gone from this vLLM ({self.key})")
        found = tuple(inspect.signature(original).parameters)
        *named, last = self.parameters or ("",)
        matches = found[: len(named)] == tuple(named) if last == "..." else found == self.parameters
        if not matches:
            raise RuntimeError(
                f"vllm-loopus: {where} takes {found}, not {self.parameters} ({self.key})"
            )
        replacement = wraps(original)(self.wrap(original))
        setattr(replacement, MARK, self.key)
        setattr(target, name, replacement)


def _is_looped(vllm_config: Any) -> bool:
    return architecture_of(getattr(vllm_config.model_config, "hf_config", None)) is not None


def _groups_by_depth(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: Any) -> Any:
        if not kv_cache_spec or not _is_looped(vllm_config):
            return original(vllm_config, kv_cache_spec)
        from vllm_loopus.serving.model.planes import group_by_depth

        return group_by_depth(kv_cache_spec)

    return get_kv_cache_groups


def alias_target(model: Any) -> Any:
    """The target of vLLM's redirect hook. Raises `AliasError` for an unknown alias."""
    from vllm.transformers_utils.utils import maybe_model_redirect

    target = maybe_model_redirect(model) if isinstance(model, str) else model
    if target == model:
        explain_unknown_alias(str(model))
    return target


def _aliases_not_looked_up(original: Callable[..., Any]) -> Callable[..., Any]:
    def is_cloud_storage(model_or_path: Any) -> Any:
        # `EngineArgs` would look up an alias on the hub; `ModelConfig` redirects it later.
        return original(model_or_path) or alias_target(model_or_path) != model_or_path

    return is_cloud_storage


def _knobs_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_params(self: Any, params: Any, supported_tasks: Any) -> Any:
        result = original(self, params, supported_tasks)
        if architecture_of(self.model_config.hf_config) is not None:
            from vllm_loopus.serving.hooks.engine_config import LoopedVllmConfig

            LoopedVllmConfig.verify_sampling_params(params, self.model_config)
        return result

    return _validate_params


def _with_exit_depths(original: Callable[..., Any]) -> Callable[..., Any]:
    def _new_completion_output(
        self: Any, token_ids: Any, finish_reason: Any, stop_reason: Any
    ) -> Any:
        completion = original(self, token_ids, finish_reason, stop_reason)
        attach(self, completion)
        explain_failure(completion)
        if self.stats is not None:
            from vllm_loopus.serving.frontend.request_stats import add_outcome

            add_outcome(self.stats, completion)
        return completion

    return _new_completion_output


def _loop_logged(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(  # noqa: N807
        self: Any,
        vllm_config: Any,
        engine_idxs: Any = None,
        custom_stat_loggers: Any = None,
        enable_default_loggers: bool = True,
        aggregate_engine_logging: bool = False,
        client_count: int = 1,
    ) -> None:
        original(
            self,
            vllm_config,
            engine_idxs,
            custom_stat_loggers,
            enable_default_loggers,
            aggregate_engine_logging,
            client_count,
        )
        if _is_looped(vllm_config):
            from vllm_loopus.serving.frontend.metrics import add_loop_logger

            add_loop_logger(self, vllm_config, logs=enable_default_loggers and client_count == 1)

    return __init__


def _handlers_adopted(original: Callable[..., Any]) -> Callable[..., Any]:
    async def init_generate_state(
        engine_client: Any, state: Any, *args: Any, **kwargs: Any
    ) -> None:
        await original(engine_client, state, *args, **kwargs)
        if _is_looped(engine_client.vllm_config):
            from vllm_loopus.serving.frontend.http import adopt_handlers

            adopt_handlers(engine_client.vllm_config, state)

    return init_generate_state


def _bodies_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    def register_vllm_serve_api_routers(app: Any) -> None:
        from vllm_loopus.serving.frontend.bodies import check_bodies

        check_bodies(app)  # before the first route; it leaves requests to other models alone
        original(app)

    return register_vllm_serve_api_routers


def _there(module: str, name: str) -> bool:
    """Whether a module has an attribute (`Class.name` for one of a class)."""
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part, None)
    return target is not None


def _model_config_has(hook: str) -> Callable[[], bool]:
    return lambda: _there("vllm.model_executor.models.config", f"VerifyAndUpdateConfig.{hook}")


def _names_are_checked() -> bool:
    return _there("vllm.transformers_utils.utils", "model_name_checks")


def _tokens_have_values() -> bool:
    from vllm.v1.engine import EngineCoreOutput

    return "token_values" in EngineCoreOutput.__struct_fields__


def _groups_have_names() -> bool:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    return "group_name" in KVCacheSpec.__dataclass_fields__


PATCHES = (
    Patch(
        key="kv-cache-groups-by-depth",
        module="vllm.v1.core.kv_cache_utils",
        name="get_kv_cache_groups",
        parameters=("vllm_config", "kv_cache_spec"),
        wrap=_groups_by_depth,
        obsolete=_groups_have_names,
    ),
    Patch(
        key="aliases-not-looked-up",
        module="vllm.engine.arg_utils",
        name="is_cloud_storage",
        parameters=("model_or_path",),
        wrap=_aliases_not_looked_up,
        obsolete=_names_are_checked,
    ),
    Patch(
        key="knobs-at-admission",
        module="vllm.v1.engine.input_processor",
        name="InputProcessor._validate_params",
        parameters=("self", "params", "supported_tasks"),
        wrap=_knobs_checked,
        obsolete=_model_config_has("verify_sampling_params"),
    ),
    Patch(
        key="exit-depths-in-outputs",
        module="vllm.v1.engine.output_processor",
        name="RequestState._new_completion_output",
        parameters=("self", "token_ids", "finish_reason", "stop_reason"),
        wrap=_with_exit_depths,
        obsolete=_tokens_have_values,
    ),
    Patch(
        key="loop-in-stat-loggers",
        module="vllm.v1.metrics.loggers",
        name="StatLoggerManager.__init__",
        parameters=(
            "self",
            "vllm_config",
            "engine_idxs",
            "custom_stat_loggers",
            "enable_default_loggers",
            "aggregate_engine_logging",
            "client_count",
        ),
        wrap=_loop_logged,
        obsolete=_model_config_has("get_stat_loggers"),
    ),
    Patch(
        key="knobs-and-depths-over-http",
        module="vllm.entrypoints.generate.api_router",
        name="init_generate_state",
        parameters=("engine_client", "state", "..."),
        wrap=_handlers_adopted,
        obsolete=_model_config_has("adapt_serving_handlers"),
    ),
    Patch(
        key="bodies-checked-at-every-route",
        module="vllm.entrypoints.serve",
        name="register_vllm_serve_api_routers",
        parameters=("app",),
        wrap=_bodies_checked,
        obsolete=_model_config_has("adapt_api_app"),
    ),
)


def apply_patches() -> None:
    """Applies all patches in this process. Safe to call again."""
    for patch in PATCHES:
        patch.apply()
