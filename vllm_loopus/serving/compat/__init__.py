"""Differences between the supported vLLM releases, detected by inspection, not by version.

`tests/serving/test_upstream.py` fails for an entry that no supported release needs any more.
"""

import inspect
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter


@dataclass(frozen=True)
class Parameter:
    """A parameter that a function of vLLM has in some of the supported releases."""

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
    "replay_boundaries",  # required in the releases that have it
)

PROMPT_WORKER_DEVICE = Parameter(
    "vllm.v1.worker.gpu.sample.prompt_logprob", "PromptLogprobsWorker.__init__", "device"
)

SHIMS = (REPLAY_BOUNDARIES, PROMPT_WORKER_DEVICE)
