"""What we override, replace, build, call or read of vLLM, with its signature: found in our code.

    python -m tests.serving.upstream    # writes the table of the installed vLLM

`VERSION.txt` is the table of a tested release. The difference of two tables is what our code has to
cope with. `test_upstream.py` compares tables, code and the installed vLLM.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from enum import Enum
from itertools import product
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_loopus.plugin import installed_vllm

FOLDER = Path(__file__).parent
PACKAGE = Path(__file__).parents[3] / "vllm_loopus"
# Found by no rule: what is called on objects of vLLM's that are handed to us.
CALLED = (
    "vllm.v1.core.block_pool.BlockPool.touch",
    "vllm.v1.core.block_pool.BlockPool.evict_blocks",
    "vllm.v1.core.block_pool.BlockPool.get_num_free_blocks",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.create_kv_cache_blocks",
    "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager.find_longest_cache_hit",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.cache_blocks",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update",
    "vllm.v1.attention.backends.triton_attn.TritonAttentionImpl.do_kv_cache_update",
    "vllm.v1.attention.backend.AttentionMetadataBuilder.build",
    "vllm.v1.attention.backend.AttentionMetadataBuilder.build_for_cudagraph_capture",
    "vllm.v1.attention.backend.AttentionMetadataBuilder.update_block_table",
    "vllm.v1.cudagraph_dispatcher.CudagraphDispatcher.dispatch",
    "vllm.v1.cudagraph_dispatcher.CudagraphDispatcher.get_capture_descs",
    "vllm.v1.cudagraph_dispatcher.CudagraphDispatcher.initialize_cudagraph_keys",
    "vllm.distributed.parallel_state.GroupCoordinator.broadcast",
    "vllm.v1.worker.utils.AttentionGroup.get_metadata_builder",
    "vllm.v1.request.Request.update_block_hashes",
    "vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker.__init__",
    "vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker.add_request",
    "vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker.remove_request",
    "vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker.compute_prompt_logprobs",
    "vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker."
    "compute_prompt_token_id_logprobs",
)
# Attributes of objects that are not part of vLLM's interface, or are read where it has none.
ATTRIBUTES = (
    "vllm.v1.attention.backend.AttentionLayer._k_scale_float",
    "vllm.v1.attention.backend.AttentionLayer._v_scale_float",
    "vllm.platforms.interface.Platform.ray_device_key",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.fake_free_list_head",
    "vllm.v1.core.kv_cache_utils.FreeKVCacheBlockQueue.num_free_blocks",
    "vllm.v1.core.block_pool.BlockPool.blocks",
    "vllm.v1.core.block_pool.BlockPool.free_block_queue",
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.single_type_managers",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.empty_kv_cache_blocks",
    "vllm.v1.core.sched.scheduler.Scheduler.grammar_compile_error_reqs",
    "vllm.v1.core.sched.scheduler.Scheduler.max_num_running_reqs",
    "vllm.v1.core.sched.scheduler.Scheduler.max_num_scheduled_tokens",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager._null_block",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.req_to_blocks",
    "vllm.v1.engine.output_processor.RequestState.routed_experts_chunks",
    "vllm.v1.metrics.loggers.PrometheusStatLogger._counter_cls",
    "vllm.v1.metrics.loggers.PrometheusStatLogger._gauge_cls",
    "vllm.v1.metrics.loggers.PrometheusStatLogger._histogram_cls",
    "vllm.v1.metrics.loggers.PrometheusStatLogger.per_engine_labelvalues",
    "vllm.v1.metrics.loggers.StatLoggerManager.engine_indexes",
    "vllm.v1.metrics.loggers.StatLoggerManager.stat_loggers",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.model_state",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prompt_logprobs_worker",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.cudagraph_dispatcher",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.input_batch",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.num_prompt_logprobs",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.requests",
)
# Objects of vLLM whose class we change: our class -> that of vLLM.
SWAPPED = {
    "LoopUSRunner": "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
    "LoopUSHandler": "vllm.entrypoints.generate.base.serving.GenerateBaseServing",
    "DepthKVCacheManager": "vllm.v1.core.kv_cache_manager.KVCacheManager",
    "PlaneManager": "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager",
    "DeepPlaneManager": "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager",
    "StaircaseCoordinator": "vllm.v1.core.kv_cache_coordinator.HybridKVCacheCoordinator",
    "LoopedRequestStats": "vllm.v1.metrics.stats.RequestStateStats",
    "V1RunnerConfig": "vllm.config.VllmConfig",
    "ExtraSlots": "vllm.v1.attention.backend.AttentionImpl",
    "Rounding": "vllm.v1.attention.backend.AttentionImpl",
    "NoSlotMappings": "vllm.v1.worker.block_table.MultiGroupBlockTable",
}
# Parents that `adopt` and the server's `adopt_handlers` give our classes at run time.
ADOPTED = {
    "LoopAdapter": (
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
    ),
    "V1Adapter": ("vllm.v1.worker.gpu_model_runner.GPUModelRunner",),
    "V2Adapter": ("vllm.v1.worker.gpu.model_runner.GPUModelRunner",),
    "LoopedHandler": ("vllm.entrypoints.generate.base.serving.GenerateBaseServing",),
    "LoopedCompletion": ("vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion",),
    "LoopedChat": ("vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat",),
    "LoopedChatBatch": (
        "vllm.entrypoints.openai.chat_completion.batch_serving.OpenAIServingChatBatch",
    ),
    "LoopedResponses": ("vllm.entrypoints.openai.responses.serving.OpenAIServingResponses",),
}


def version() -> str:
    """The installed vLLM as tables are named: major.minor."""
    found = installed_vllm()
    assert found is not None
    return f"{found[1].major}.{found[1].minor}"


def recorded() -> dict[str, dict[str, str]]:
    """Version -> symbol -> signature, for all tables, lowest version first."""
    tables = {}
    for file in FOLDER.glob("*.txt"):
        pairs = (line.split(" ", 1) for line in file.read_text().splitlines())
        tables[file.stem] = dict(pairs)
    return dict(sorted(tables.items(), key=lambda item: tuple(map(int, item[0].split(".")))))


def table() -> dict[str, str]:
    """Symbol -> signature in the installed vLLM, "gone" where there is none."""
    symbols = {*imported(), *replaced(), *overridden(), *CALLED, *ATTRIBUTES, *SWAPPED.values()}
    built = _names_called()
    return {symbol: signature(symbol, built) for symbol in sorted(symbols)}


def signature(symbol: str, built: set[str]) -> str:
    """Names, kinds and defaults of the parameters; the kind of what we do not call. `built`: names
    that our code calls."""
    if symbol in ATTRIBUTES:
        return "attribute" if has_attribute(symbol) else "gone"
    try:
        target = inspect.unwrap(resolve(symbol))
    except (ImportError, AttributeError):
        return "gone"
    if isinstance(target, ModuleType):
        return "module"
    if inspect.isclass(target) and (issubclass(target, Enum) or target.__name__ not in built):
        return "class"
    if not callable(target):
        return type(target).__name__
    try:
        found = inspect.signature(target)
    except (TypeError, ValueError):
        return "callable"
    parameters = []
    for parameter in found.parameters.values():
        bare = parameter.replace(annotation=inspect.Parameter.empty)
        constant = isinstance(bare.default, str | int | float | bool | tuple | type(None))
        if bare.default is not inspect.Parameter.empty and not constant:
            bare = bare.replace(default=...)
        parameters.append(bare)
    return str(inspect.Signature(parameters))


def has_attribute(symbol: str) -> bool:
    """Whether a class of vLLM defines or assigns the attribute with this dotted name."""
    owner, _, name = symbol.rpartition(".")
    try:
        classes = resolve(owner).__mro__
    except (ImportError, AttributeError):
        return False
    assigned = re.compile(rf"\bself\.{name}\b[^=\n]*=[^=]|^    {name}\b *[:=]", re.MULTILINE)
    ours = [c for c in classes if c.__module__.startswith("vllm.")]
    return any(name in vars(c) or assigned.search(inspect.getsource(c)) for c in ours)


def private_attributes() -> Iterator[tuple[str, str]]:
    """File and name of the private attributes that our serving code reads and does not define."""
    trees = {file: ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    ours = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    ours |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    annotated = [n.target for n in nodes if isinstance(n, ast.AnnAssign)]
    ours |= {target.id for target in annotated if isinstance(target, ast.Name)}
    for file, tree in trees.items():
        if "serving" not in file.parts:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or ast.unparse(node).startswith("torch."):
                continue
            name = node.attr
            if name.startswith("_") and not name.startswith("__") and name not in ours:
                yield file.name, name


def class_swaps() -> Iterator[tuple[str, str]]:
    """File and new class of every assignment to `__class__` in our code."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Assign):
                continue
            if any(isinstance(t, ast.Attribute) and t.attr == "__class__" for t in node.targets):
                yield file.name, ast.unparse(node.value)


def resolve(symbol: str) -> Any:
    """The module or attribute with this dotted name."""
    parts = symbol.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return attrgetter(".".join(parts[length:]))(module) if parts[length:] else module
    raise ImportError(symbol)


def imported() -> Iterator[str]:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _names_called() -> set[str]:
    nodes = (
        node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))
    )
    calls = (node.func for node in nodes if isinstance(node, ast.Call))
    return {func.id for func in calls if isinstance(func, ast.Name)}


def replaced() -> Iterator[str]:
    from vllm_loopus.serving.hooks.patches import PATCHES

    for patch in PATCHES:
        yield f"{patch.module}.{patch.name}"


def overridden() -> Iterator[str]:
    """Methods of vLLM's that our classes define again, or call by `self` or `super()`."""
    import vllm_loopus.serving as serving

    for found in pkgutil.walk_packages(serving.__path__, "vllm_loopus.serving."):
        module = importlib.import_module(found.name)
        tree = ast.parse(Path(str(module.__file__)).read_text())
        for node in (n for n in tree.body if isinstance(n, ast.ClassDef)):
            ours = getattr(module, node.name)
            adopted = [resolve(name).__mro__ for name in ADOPTED.get(node.name, ())]
            names = {name for name in vars(ours) if not name.startswith("__")} | _used(node)
            for name, parents in product(names, adopted or [ours.__mro__[1:]]):
                owner = next((c for c in parents if name in vars(c)), None)
                if owner is None or not owner.__module__.startswith("vllm."):
                    continue
                if callable(getattr(owner, name)):
                    yield f"{owner.__module__}.{owner.__qualname__}.{name}"


def _used(tree: ast.ClassDef) -> set[str]:
    """Names that methods of a class look up on `self` and `super()`."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = node.value
            name = of.func if isinstance(of, ast.Call) else of
            if isinstance(name, ast.Name) and name.id in ("self", "super"):
                used.add(node.attr)
    return used
