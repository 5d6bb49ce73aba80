"""What of vLLM we override, replace, build or call, with its signature: found in our own code.

    python -m tests.serving.upstream    # writes the table of the installed vLLM

`VERSION.txt` is the table of a tested release. Where two tables differ, what our code has to bear
is seen at a glance. `test_upstream.py` holds tables, code and the installed vLLM against each
other.
"""

import ast
import importlib
import inspect
import pkgutil
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
    "vllm.v1.attention.backend.AttentionMetadataBuilder.build",
    "vllm.v1.attention.backend.AttentionMetadataBuilder.build_for_cudagraph_capture",
    "vllm.v1.worker.utils.AttentionGroup.get_metadata_builder",
    "vllm.v1.request.Request.update_block_hashes",
    "vllm.v1.worker.gpu.sample.prompt_logprob.PromptLogprobsWorker."
    "compute_prompt_token_id_logprobs",
)
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
    symbols = {*imported(), *replaced(), *overridden(), *CALLED}
    built = _names_called()
    return {symbol: signature(symbol, built) for symbol in sorted(symbols)}


def signature(symbol: str, built: set[str]) -> str:
    """Names, kinds and defaults of the parameters; the kind of what we do not call. `built`: names
    that our code calls."""
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
