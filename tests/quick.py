"""Quick starts of engines, in a test's process and in those that vLLM starts from it."""

import gc


def starts() -> None:
    """What vLLM does for every engine is done once in the process: a start takes 0.5 s, not 5.

    It looks for Triton kernels in all modules, and walks the whole heap for garbage five times. And
    for each model class it starts a process that looks at it, because of CUDA.
    """
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.v1.engine import core
    from vllm.v1.worker import gpu_worker

    if current_platform.is_cpu():
        platform = type(current_platform)
        platform.register_triton_kernel_overrides()
        platform.register_triton_kernel_overrides = classmethod(lambda cls: None)
        registry._run_in_subprocess = lambda function: function()
    core.freeze_gc_heap = gpu_worker.freeze_gc_heap = gc.unfreeze = lambda: None
    gc.collect()
    gc.freeze()
