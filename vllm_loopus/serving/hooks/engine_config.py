"""What vLLM's configuration must be for a looped model, checked before any work starts.

vLLM calls these hooks for our architectures and for no others (`MODELS_CONFIG_MAP`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.config.model import _check_valid_dtype
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_loopus.architectures import ARCHITECTURES, LoopedConfig, architecture_of
from vllm_loopus.modeling.checkpoint import TOKENIZER_FILES
from vllm_loopus.serving.hooks.cpu_memory import size_cpu_cache
from vllm_loopus.serving.hooks.kv_dtype import check_kv_dtype
from vllm_loopus.serving.hooks.log import note_looped_model
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.knobs.request import check_request
from vllm_loopus.serving.model.cpu_kernels import prefer_c_norms
from vllm_loopus.serving.runners.selection import check_runner, select_runner

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.loopus")

SCHEDULER = "vllm_loopus.serving.core.scheduler.LoopUSScheduler"
WORKER = "vllm_loopus.serving.runners.worker.LoopUSWorker"


class LoopedVllmConfig(VerifyAndUpdateConfig):
    """Checks and defaults for models of our architectures."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Raises `ValueError` for a config that is not of a looped model or does not fit
        together."""
        config = model_config.hf_config
        if (architecture := architecture_of(config)) is None:
            names = ", ".join(architecture.name for architecture in ARCHITECTURES)
            raise ValueError(
                f"model_type={config.model_type!r} in config.json of {model_config.model} is not a "
                f"looped model, but architectures={config.architectures} asks for one ({names}); "
                "correct model_type or architectures, or recast the model (vllm-loopus recast)"
            )
        _refuse(
            model_config.runner_type != "generate",
            f"runner={model_config.runner_type!r} (convert={model_config.convert_type!r})",
            "it generates text, and which of its depths would embed or classify one is not "
            "defined; leave --runner and --convert out, and embed with a model made for it",
        )
        config.check()  # again: hf_overrides were applied after the config was built
        config.check_served()
        if architecture.settle is not None:
            architecture.settle(config, model_config.model, model_config.revision)
        _check_valid_dtype(config.get_text_config().model_type, model_config.dtype)
        context = config.exact_context
        _refuse(
            context is not None and model_config.max_model_len > context,
            f"max_model_len={model_config.max_model_len}",
            f"longrope rotates by other frequencies beyond {context} positions, "
            f"which changes K/V computed before; set max_model_len to {context} or less",
        )
        _use_the_base_tokenizer(model_config, config)
        check_runner()

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Raises `ValueError` that names the option, its value and the fix for what cannot
        work."""
        note_looped_model()
        _refuse_impossible(vllm_config)
        options = EngineOptions.of(vllm_config.additional_config)
        options.check(vllm_config.model_config.hf_config)
        _settle_first_state(vllm_config, options.initial_state)
        select_runner(vllm_config)
        _settle_compilation(vllm_config)
        prefer_c_norms(vllm_config)
        size_cpu_cache(vllm_config)
        _use_our_classes(vllm_config)

    # Hooks that we proposed to vLLM (`patches/`). Until vLLM calls them, `patches.py` does. They
    # import modules that only the front end needs.

    @staticmethod
    def verify_sampling_params(params: Any, model_config: "ModelConfig") -> None:
        """Raises `KnobError` (HTTP 400) for impossible knobs of a request."""
        check_request(
            getattr(params, "extra_args", None),
            model_config.hf_config,
            getattr(params, "max_tokens", None),
            model_config.max_model_len,
            bool(model_config.logits_processors),
        )

    @staticmethod
    def get_stat_loggers(
        vllm_config: "VllmConfig",
        engine_indexes: list[int],
        prometheus_logger: Any,
        log_stats: bool,
    ) -> list[Any]:
        """The logger of the loop's metrics."""
        from vllm_loopus.serving.frontend.metrics import LoopStatLogger

        return [LoopStatLogger(vllm_config, engine_indexes, prometheus_logger, log_stats)]

    @staticmethod
    def adapt_serving_handlers(vllm_config: "VllmConfig", state: Any) -> None:
        """Makes the API server's handlers support knobs and exit depths."""
        from vllm_loopus.serving.frontend.http import adopt_handlers

        adopt_handlers(vllm_config, state)

    @staticmethod
    def adapt_api_app(app: Any) -> None:
        """Makes the API server refuse knobs where a route would ignore them."""
        from vllm_loopus.serving.frontend.bodies import check_bodies

        check_bodies(app)


def _refuse_impossible(vllm_config: "VllmConfig") -> None:
    parallel = vllm_config.parallel_config
    _refuse(
        parallel.pipeline_parallel_size > 1,
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}",
        "a loop cannot be cut into pipeline stages; use tensor_parallel_size instead",
    )
    speculative = vllm_config.speculative_config
    _refuse(
        speculative is not None,
        f"speculative_config={{'method': {getattr(speculative, 'method', None)!r}}}",
        "speculative decoding does not follow recursion depth; remove it",
    )
    _refuse(
        getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False),
        "enable_dbo=True",
        "micro-batches are not supported; leave it off",
    )
    _refuse(
        parallel.decode_context_parallel_size > 1,
        f"decode_context_parallel_size={parallel.decode_context_parallel_size}",
        "planes by depth are not sharded by position; set it to 1",
    )
    cache = vllm_config.cache_config
    check_kv_dtype(vllm_config)
    _refuse(
        vllm_config.kv_transfer_config is not None,
        "kv_transfer_config",
        "KV connectors do not know planes by depth; remove it",
    )
    _refuse(
        cache.kv_offloading_size is not None,
        f"kv_offloading_size={cache.kv_offloading_size}",
        "offloading does not know planes by depth; remove it",
    )
    _refuse(
        cache.kv_sharing_fast_prefill,
        "kv_sharing_fast_prefill=True",
        "every layer has K/V of its own; leave it off",
    )
    _refuse(
        bool(vllm_config.scheduler_config.async_scheduling),
        "async_scheduling=True",
        "which sequences get a token is only known after a step; leave it off",
    )
    _refuse(
        vllm_config.model_config.enable_prompt_embeds,
        "enable_prompt_embeds=True",
        "prompts are token ids; leave it off",
    )
    _refuse(
        vllm_config.lora_config is not None,
        "enable_lora=True",
        "vLLM tells adapters of the rows that are sampled, not of those of a pass at many depths; "
        "merge the adapter into the checkpoint (merge_and_unload of peft) and serve the result",
    )
    scheduler = vllm_config.scheduler_config.scheduler_cls
    _refuse(
        parallel.worker_cls == "auto" and scheduler is not None and not _is_ours(vllm_config),
        f"scheduler_cls={scheduler!r}",
        f"the worker of a loop needs {SCHEDULER} or a subclass; leave it out",
    )
    _refuse(
        parallel.worker_cls.startswith("vllm.") and scheduler is None,
        f"worker_cls={parallel.worker_cls!r}",
        f"the scheduler of a loop needs {WORKER} or a subclass; leave it out",
    )


def _is_ours(vllm_config: "VllmConfig") -> bool:
    """Whether the scheduler that the user chose knows of loops."""
    return getattr(vllm_config.scheduler_config.get_scheduler_cls(), "knows_loops", False)


def _use_our_classes(vllm_config: "VllmConfig") -> None:
    """Our scheduler, worker and executor, where the user chose none; no asynchronous scheduling.

    vLLM's asynchronous scheduling prepares a step before the outcome of the one before is known;
    here that outcome says which sequences have a token at all.
    """
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    scheduler.async_scheduling = False
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULER
    if parallel.worker_cls == "auto":
        parallel.worker_cls = WORKER
    if parallel.distributed_executor_backend == "ray" and current_platform.is_cpu():
        # vLLM has checked that ray is there.
        from vllm_loopus.serving.runners.ray_cpu import RayCPUExecutor

        parallel.distributed_executor_backend = RayCPUExecutor


def _settle_compilation(vllm_config: "VllmConfig") -> None:
    """No compilation and no CUDA graph unless the user asks for one (`worker/regions.py`).

    Graphs hold a whole region, attention included: nothing cuts it into compiled pieces.
    """
    compilation = vllm_config.compilation_config
    if compilation.mode is None:
        compilation.mode = CompilationMode.NONE
    mode = compilation.cudagraph_mode
    if mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return
    _refuse(
        mode.requires_piecewise_compilation(),
        f"cudagraph_mode={mode.name}",
        "its regions are captured whole; use FULL, FULL_DECODE_ONLY or NONE",
    )


def _settle_first_state(vllm_config: "VllmConfig", chosen: str | None) -> None:
    """Checks the option `initial_state`. Where it has only so many positions, sequences have no
    more: vLLM refuses longer prompts."""
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    architecture = architecture_of(model.hf_config)
    assert architecture is not None
    if architecture.first_state is None:
        if chosen is not None:
            raise ValueError(
                f"initial_state={chosen!r} is not possible with {architecture.family} models, "
                "whose first state is computed from the tokens; leave it out"
            )
        return
    positions = architecture.first_state(model.hf_config, chosen)
    if positions is not None and positions < model.max_model_len:
        logger.warning(
            "initial_state has %d positions: max_model_len is %d instead of %d",
            positions,
            positions,
            model.max_model_len,
        )
        model.max_model_len = scheduler.max_model_len = positions


def _refuse(condition: bool, option: str, fix: str) -> None:
    if condition:
        raise ValueError(f"{option} is not possible with a looped model: {fix}")


def _use_the_base_tokenizer(model_config: "ModelConfig", config: LoopedConfig) -> None:
    """Uses the base model's tokenizer if a local checkpoint has none."""
    folder = Path(model_config.model)
    if (
        model_config.skip_tokenizer_init
        or model_config.tokenizer != model_config.model
        or not folder.is_dir()
        or any((folder / name).exists() for name in TOKENIZER_FILES)
    ):
        return
    if not config.base_model_name_or_path:
        raise ValueError(
            f"tokenizer={model_config.model} has no tokenizer files and the checkpoint has no "
            "base_model_name_or_path; pass tokenizer=NAME or skip_tokenizer_init=True"
        )
    logger.info("%s has no tokenizer: using its base's, %s", folder, config.base_model_name_or_path)
    model_config.tokenizer = config.base_model_name_or_path
