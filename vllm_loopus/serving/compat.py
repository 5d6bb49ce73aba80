"""What differs between the vLLM releases of our range: looked for, never asked of a version number.

`tests/serving/test_upstream.py` fails for a shim that no release of the range needs any more.
"""

import inspect
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter


@dataclass(frozen=True)
class Parameter:
    """A parameter that a function of vLLM's has in some releases of the range."""

    module: str
    function: str
    name: str

    @property
    def is_there(self) -> bool:
        function = attrgetter(self.function)(import_module(self.module))
        return self.name in inspect.signature(function).parameters


REPLAY_BOUNDARIES = Parameter(
    "vllm.v1.core.single_type_kv_cache_manager",
    "SingleTypeKVCacheManager.cache_blocks",
    "replay_boundaries",  # without a default where it is there; before, positions to keep were none
)

SHIMS = (REPLAY_BOUNDARIES,)
