"""Imports all that the measures import and makes an engine's configuration. A line of JSON.

PRETEND_CUDA=1 PYTHONPATH=pretend:VLLM:REPOSITORY:benchmarks/device python pretend/look.py MODEL
"""

import json
import sys
from importlib import import_module, metadata
from pathlib import Path

MODULES = (
    "vllm",
    "vllm_loopus.cli.main",
    "vllm_loopus.serving.core.scheduler",
    "vllm_loopus.recast.convert",
    "vllm_loopus.tiny.dataset",
    "vllm_loopus.training.run",
    *(f"measures.{name}" for name in ("compiled", "golden", "host", "passes", "speed", "training")),
)
# vLLM's GPU worker and what imports it cannot be imported without Triton.
OF_TRITON = (
    "vllm.v1.attention.backends.triton_attn",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm_loopus.serving.model.loopus",
    "vllm_loopus.serving.runners.worker",
    "vllm_loopus.serving.runners.v1",
    "vllm_loopus.serving.runners.v2",
)


def configuration(model: str) -> dict[str, str]:
    """Of an engine with graphs; vLLM looks at the model's class in a process of its own."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        attention_backend="TRITON_ATTN",
        compilation_config={"cudagraph_mode": "FULL", "custom_ops": ["all"]},
    )
    config = arguments.create_engine_config()
    return {
        "worker": str(config.parallel_config.worker_cls),
        "scheduler": str(config.scheduler_config.scheduler_cls),
        "graphs": str(config.compilation_config.cudagraph_mode),
    }


def main() -> None:
    for name in MODULES:
        import_module(name)
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.triton_utils import HAS_TRITON

    load_general_plugins()
    if HAS_TRITON:
        for name in OF_TRITON:
            import_module(name)
    found = configuration(sys.argv[1])
    from vllm import ModelRegistry

    files = {name: sys.modules[name].__file__ for name in ("vllm", "vllm_loopus", "measures")}
    seen = {
        "vllm": metadata.version("vllm"),
        "platform": type(current_platform).__name__,
        "device": current_platform.get_device_name(),
        "triton": HAS_TRITON,
        "registered": "LoopUSForCausalLM" in ModelRegistry.get_supported_archs(),
        "files": {name: str(Path(file or "").parent) for name, file in files.items()},
    }
    print(json.dumps({**seen, **found}))


if __name__ == "__main__":
    main()
