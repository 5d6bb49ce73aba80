"""What vLLM's configuration must be for a LoopUS model, checked before any work starts.

vLLM calls these hooks for our architecture and for no other (`MODELS_CONFIG_MAP`).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.config import CacheConfig, CompilationMode, CUDAGraphMode
from vllm.config.model import _check_valid_dtype
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.checkpoint import TOKENIZER_FILES
from vllm_loopus.serving.cpu_kernels import prefer_c_norms
from vllm_loopus.serving.knobs import EngineOptions
from vllm_loopus.serving.memory import CPU_CACHE_SHARE, free_cpu_memory
from vllm_loopus.serving.runners.selection import select_runner

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.loopus")


class LoopUSVllmConfig(VerifyAndUpdateConfig):
    """Checks and defaults for models of our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Raises `ValueError` for a config that is no LoopUS config or does not fit together."""
        config = model_config.hf_config
        if not isinstance(config, LoopUSConfig):
            raise ValueError(
                f"model_type={config.model_type!r} in config.json of {model_config.model} is not a "
                "LoopUS model, but architectures asks for LoopUSForCausalLM; recast the model "
                "first or correct architectures"
            )
        config.check()  # again: hf_overrides were applied after the config was built
        _check_valid_dtype(config.base.model_type, model_config.dtype)
        context = config.attention.exact_context
        _refuse(
            context is not None and model_config.max_model_len > context,
            f"max_model_len={model_config.max_model_len}",
            f"longrope of base_config rotates by other frequencies beyond {context} positions, "
            f"which changes K/V computed before; set max_model_len to {context} or less",
        )
        _use_the_base_tokenizer(model_config, config)
        select_runner()

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Raises `ValueError` naming the option, its value and the fix for what cannot work."""
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
            "planes by depth are not sharded by position; leave it 1",
        )
        cache_dtype = vllm_config.cache_config.cache_dtype
        _refuse(
            cache_dtype not in ("auto", "bfloat16", "float16", "float32"),
            f"kv_cache_dtype={cache_dtype!r}",
            "quantised K/V is not supported; use 'auto'",
        )
        _refuse(
            vllm_config.kv_transfer_config is not None,
            "kv_transfer_config",
            "KV connectors do not know planes by depth; remove it",
        )
        EngineOptions.of(vllm_config.additional_config).check(vllm_config.model_config.hf_config)
        _settle_compilation(vllm_config)
        prefer_c_norms(vllm_config)
        _size_cpu_cache(vllm_config)
        _loop_inside_the_step(vllm_config)


def _loop_inside_the_step(vllm_config: "VllmConfig") -> None:
    """Our scheduler, worker and executor, where the user chose none; no asynchronous scheduling.

    It prepares a step before the outcome of the one before is known; here that outcome says which
    sequences have a token at all.
    """
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    _refuse(
        bool(scheduler.async_scheduling),
        "async_scheduling=True",
        "which sequences get a token is known after a step only; leave it off",
    )
    _refuse(
        vllm_config.model_config.enable_prompt_embeds,
        "enable_prompt_embeds=True",
        "prompts are token ids; leave it off",
    )
    scheduler.async_scheduling = False
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = "vllm_loopus.serving.scheduler.LoopUSScheduler"
    if parallel.worker_cls == "auto":
        parallel.worker_cls = "vllm_loopus.serving.worker.LoopUSWorker"
    if parallel.distributed_executor_backend == "ray" and current_platform.is_cpu():
        from vllm_loopus.serving.ray_cpu import RayCPUExecutor  # vLLM has checked that ray is there

        parallel.distributed_executor_backend = RayCPUExecutor


def _size_cpu_cache(vllm_config: "VllmConfig") -> None:
    """On a CPU, K/V takes a share of the memory that is free now, unless the user sized it.

    vLLM's own default claims 92 % of all memory and refuses to start where less is free.
    """
    cache = vllm_config.cache_config
    if (
        not current_platform.is_cpu()
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or cache.kv_cache_memory_bytes is not None
        or cache.gpu_memory_utilization != CacheConfig.gpu_memory_utilization
    ):
        return
    free, nodes = free_cpu_memory()
    parallel = vllm_config.parallel_config
    ranks = cdiv(parallel.world_size * max(parallel.data_parallel_size_local, 1), nodes)
    cache.kv_cache_memory_bytes = int(CPU_CACHE_SHARE * free) // ranks
    logger.info(
        "K/V takes %.1f GiB a rank, %d %% of the memory node's free memory; "
        "VLLM_CPU_KVCACHE_SPACE (GiB) overrides",
        cache.kv_cache_memory_bytes / 2**30,
        100 * CPU_CACHE_SHARE,
    )


def _settle_compilation(vllm_config: "VllmConfig") -> None:
    """No compilation and no CUDA graph unless the user asks for one (`regions.py`).

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


def _refuse(condition: bool, option: str, fix: str) -> None:
    if condition:
        raise ValueError(f"{option} is not possible with a LoopUS model: {fix}")


def _use_the_base_tokenizer(model_config: "ModelConfig", config: LoopUSConfig) -> None:
    """Take the base model's tokenizer where a local checkpoint has none of its own."""
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
            f"tokenizer={model_config.model} holds no tokenizer files and the checkpoint names no "
            "base_model_name_or_path; pass tokenizer=NAME or skip_tokenizer_init=True"
        )
    logger.info("%s has no tokenizer: using its base's, %s", folder, config.base_model_name_or_path)
    model_config.tokenizer = config.base_model_name_or_path
