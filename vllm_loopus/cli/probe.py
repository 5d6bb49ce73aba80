"""Run by `doctor` in a separate interpreter: checks that vLLM's processes load the plugin.

    python -m vllm_loopus.cli.probe

prints JSON as the last line of standard output, with the state after vLLM has loaded its plugins,
of the front end and of a process that is spawned like engine cores and workers.
"""

import json
import multiprocessing
from typing import Any


def state() -> dict[str, Any]:
    """Whether looped models are registered in this process, and how many patches are applied."""
    from importlib import import_module
    from operator import attrgetter

    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    from vllm_loopus.architectures import ARCHITECTURES
    from vllm_loopus.serving.hooks.patches import MARK, PATCHES

    load_general_plugins()
    targets = [attrgetter(patch.name)(import_module(patch.module)) for patch in PATCHES]
    return {
        "registered": all(one.name in ModelRegistry.models for one in ARCHITECTURES),
        "patches": sum(
            getattr(target, MARK, None) == patch.key or patch.obsolete()
            for target, patch in zip(targets, PATCHES, strict=True)
        ),
        "of": len(PATCHES),
    }


def main() -> None:
    front_end = state()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.apply(state)
    print(json.dumps({"front end": front_end, "spawned process": spawned}))


if __name__ == "__main__":
    main()
