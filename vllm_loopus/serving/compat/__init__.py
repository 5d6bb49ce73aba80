"""What differs between the vLLM releases of our range. We look for it, never at a version number.

`tests/serving/test_upstream.py` fails for an entry that no release of the range needs any more.
"""

import inspect
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter


@dataclass(frozen=True)
class Parameter:
    """A parameter that a function of vLLM has in some releases of the range."""

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
    "replay_boundaries",  # has no default where it is there; releases without it keep no positions
)

PROMPT_WORKER_DEVICE = Parameter(
    "vllm.v1.worker.gpu.sample.prompt_logprob", "PromptLogprobsWorker.__init__", "device"
)

SHIMS = (REPLAY_BOUNDARIES, PROMPT_WORKER_DEVICE)
