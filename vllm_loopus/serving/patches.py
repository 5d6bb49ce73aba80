"""The places where vLLM itself has to give way. `patches/catalogue.toml` tells why.

Each patch wraps one function and calls the original for everything but LoopUS models and
redirected names; it is applied once a process. A name that has disappeared from vLLM or has other
parameters stops the start-up.
"""

import importlib
import inspect
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from vllm_loopus.aliases import explain_unknown_alias
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.serving.answers import explain
from vllm_loopus.serving.depths import attach, count

MARK = "_vllm_loopus_patch"


@dataclass(frozen=True)
class Patch:
    """Replaces the function `name` (or `Class.name`) of `module`. `wrap` takes the original."""

    key: str  # its entry in patches/catalogue.toml
    module: str
    name: str
    parameters: tuple[str, ...]  # "..." at the end: more may follow, `wrap` passes them on
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    def apply(self) -> None:
        """Idempotent. Raises `RuntimeError` when vLLM no longer has what is replaced."""
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


def _groups_by_depth(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: Any) -> Any:
        model_config = vllm_config.model_config
        if not kv_cache_spec or not isinstance(
            getattr(model_config, "hf_config", None), LoopUSConfig
        ):
            return original(vllm_config, kv_cache_spec)
        from vllm_loopus.serving.planes import group_by_depth

        return group_by_depth(kv_cache_spec)

    return get_kv_cache_groups


def _alias_target(model: Any) -> Any:
    """Where vLLM's redirect hook leads. Raises `AliasError` for an alias that leads nowhere."""
    from vllm.transformers_utils.utils import maybe_model_redirect

    target = maybe_model_redirect(model) if isinstance(model, str) else model
    if target == model:
        explain_unknown_alias(str(model))
    return target


def _alias_offline(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_model_path(model: Any, revision: str | None = None) -> Any:
        # The name stays: ModelConfig redirects it and serves the model under it.
        return model if _alias_target(model) != model else original(model, revision)

    return get_model_path


def _alias_before_speculators(original: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_override_with_speculators(model: str, *args: Any, **kwargs: Any) -> Any:
        target = _alias_target(model)
        found, *rest = original(target, *args, **kwargs)
        return (model if found == target else found, *rest)

    return maybe_override_with_speculators


def _with_exit_depths(original: Callable[..., Any]) -> Callable[..., Any]:
    def _new_completion_output(
        self: Any, token_ids: Any, finish_reason: Any, stop_reason: Any
    ) -> Any:
        completion = original(self, token_ids, finish_reason, stop_reason)
        attach(self, completion)
        explain(completion)
        if self.stats is not None:
            from vllm_loopus.serving.request_stats import add_outcome

            add_outcome(self.stats, completion)
        return completion

    return _new_completion_output


def _knobs_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_params(self: Any, params: Any, supported_tasks: Any) -> Any:
        result = original(self, params, supported_tasks)
        config = self.model_config.hf_config
        if isinstance(config, LoopUSConfig):
            from vllm_loopus.serving.knobs import check_request

            check_request(
                getattr(params, "extra_args", None),
                config,
                getattr(params, "max_tokens", None),
                self.model_config.max_model_len,
                bool(self.model_config.logits_processors),
            )
        return result

    return _validate_params


def _handlers_adopted(original: Callable[..., Any]) -> Callable[..., Any]:
    async def init_generate_state(
        engine_client: Any, state: Any, *args: Any, **kwargs: Any
    ) -> None:
        await original(engine_client, state, *args, **kwargs)
        from vllm_loopus.serving.http import adopt_handlers

        adopt_handlers(engine_client.vllm_config, state)

    return init_generate_state


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
        from vllm_loopus.serving.metrics import add_loop_logger

        add_loop_logger(self, vllm_config, logs=enable_default_loggers and client_count == 1)

    return __init__


def _depths_counted(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        count(self, output)
        return original(self, output, *args, **kwargs)

    return update_from_output


def _damage_named(original: Callable[..., Any]) -> Callable[..., Any]:
    def parse_safetensors_file_metadata(path: Any) -> Any:
        try:
            return original(path)
        except (ValueError, OverflowError, MemoryError, struct.error) as error:
            raise ValueError(
                f"{path} is not a whole safetensors file: {error}; copy the checkpoint again"
            ) from error

    return parse_safetensors_file_metadata


def _death_told(original: Callable[..., Any]) -> Callable[..., Any]:
    async def serve(self: Any, sockets: Any = None) -> None:
        engine = getattr(self.config.app.state, "engine_client", None)  # vLLM deletes the state
        await original(self, sockets)  # cancelled where a signal ends the server
        if (
            engine is not None
            and engine.errored
            and isinstance(engine.vllm_config.model_config.hf_config, LoopUSConfig)
        ):
            raise engine.dead_error

    return serve


def _draining_noted(original: Callable[..., Any]) -> Callable[..., Any]:
    def shutdown(self: Any, timeout: float | None = None) -> None:
        from vllm_loopus.serving.http import DRAINING

        setattr(self, DRAINING, True)
        original(self, timeout)

    return shutdown


PATCHES = (
    Patch(
        key="damaged-file-named",
        module="vllm.transformers_utils.config",
        name="parse_safetensors_file_metadata",
        parameters=("path",),
        wrap=_damage_named,
    ),
    Patch(
        key="kv-cache-groups-by-depth",
        module="vllm.v1.core.kv_cache_utils",
        name="get_kv_cache_groups",
        parameters=("vllm_config", "kv_cache_spec"),
        wrap=_groups_by_depth,
    ),
    Patch(
        key="redirect-when-offline",
        module="vllm.engine.arg_utils",
        name="get_model_path",
        parameters=("model", "revision"),
        wrap=_alias_offline,
    ),
    Patch(
        key="redirect-before-speculators",
        module="vllm.engine.arg_utils",
        name="maybe_override_with_speculators",
        parameters=("model", "..."),
        wrap=_alias_before_speculators,
    ),
    Patch(
        key="knobs-at-admission",
        module="vllm.v1.engine.input_processor",
        name="InputProcessor._validate_params",
        parameters=("self", "params", "supported_tasks"),
        wrap=_knobs_checked,
    ),
    Patch(
        key="exit-depths-in-outputs",
        module="vllm.v1.engine.output_processor",
        name="RequestState._new_completion_output",
        parameters=("self", "token_ids", "finish_reason", "stop_reason"),
        wrap=_with_exit_depths,
    ),
    Patch(
        key="exit-depths-in-iteration-stats",
        module="vllm.v1.metrics.stats",
        name="IterationStats.update_from_output",
        parameters=("self", "output", "..."),
        wrap=_depths_counted,
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
    ),
    Patch(
        key="knobs-and-depths-over-http",
        module="vllm.entrypoints.generate.api_router",
        name="init_generate_state",
        parameters=("engine_client", "state", "..."),
        wrap=_handlers_adopted,
    ),
    Patch(
        key="dead-engine-fails-the-server",
        module="vllm.entrypoints.launchers.launcher",
        name="NoSignalServer.serve",
        parameters=("self", "sockets"),
        wrap=_death_told,
    ),
    Patch(
        key="refused-while-draining",
        module="vllm.v1.engine.async_llm",
        name="AsyncLLM.shutdown",
        parameters=("self", "timeout"),
        wrap=_draining_noted,
    ),
)


def apply_patches() -> None:
    """Apply all patches in this process. Safe to call again."""
    for patch in PATCHES:
        patch.apply()
