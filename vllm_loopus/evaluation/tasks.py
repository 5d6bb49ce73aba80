"""Loads tasks of lm-evaluation-harness, including ours, before an engine starts."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.tasks import TaskManager

from vllm_loopus.evaluation.columns import PRESETS

OURS = [Path(__file__).with_name(name) for name in ("tiny_tasks", "held_out")]
FEWSHOT_SEED = 1234  # lm-eval's default
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of a function


@dataclass(frozen=True)
class LoadedTask:
    """A task or a group of tasks. `found`: the tasks as loaded by lm-eval."""

    name: str
    found: Mapping[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """The tasks in the group, or the task itself."""
        return list(self.found["tasks"].values())

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics of its tasks."""
        names = (entry["metric"] for leaf in self.leaves for entry in leaf.config.metric_list or ())
        return list(dict.fromkeys(str(name) for name in names))

    def fingerprint(self, limit: int | None) -> str:
        """A hash of the documents used and of how they are formatted and scored."""
        digest = hashlib.sha256()
        for leaf in self.leaves:
            config = dict(leaf.dump_config())
            metadata = config.pop("metadata", None) or {}
            config["version"] = metadata.get("version")  # the rest depends on the file's path
            digest.update(ADDRESS.sub("", _json(config)).encode())
            for index, document in enumerate(leaf.eval_docs):
                if limit is not None and index >= limit:
                    break
                digest.update(_json(document).encode())
        return digest.hexdigest()


def load_tasks(
    names: Sequence[str], num_fewshot: int | None = None, include: Path | None = None
) -> list[LoadedTask]:
    """Loads tasks by name.

    `num_fewshot`: overrides the number of examples of each task. `include`: a folder with the
    user's task definitions. Raises `ValueError` for an unknown task, or if its data is missing.
    """
    manager = _manager(include, lm_evals=False)
    if not set(names) <= set(manager.all_tasks):
        manager = _manager(include, lm_evals=True)
    for name in names:
        if name not in manager.all_tasks:
            known = [*PRESETS, *manager.all_tasks]
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise ValueError(
                f"tasks: {name!r} is neither a task of lm-evaluation-harness nor a preset "
                f"({', '.join(PRESETS)}); {hint}"
            )
    loaded = [task for name in names for task in _load(manager, name)]
    for leaf in (leaf for task in loaded for leaf in task.leaves):
        own = leaf.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # 0 cannot be overridden
            leaf.set_config("num_fewshot", num_fewshot or own or 0)
        leaf.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


@cache
def _manager(include: Path | None, lm_evals: bool) -> Any:
    """Finds our tasks and the user's, and optionally those of lm-eval, whose index is slow."""
    folders = [*OURS, *([include] if include else [])]
    return TaskManager(include_path=folders, include_defaults=lm_evals)


def _load(manager: Any, name: str) -> list[LoadedTask]:
    """Loads the task or group with this name, or all tasks with this tag."""
    try:
        found = manager.load([name])
    except (OSError, DatasetsError, HfHubHTTPError) as error:  # no network is an OSError
        raise ValueError(
            f"tasks: the data of {name!r} is not on this machine and could not be downloaded "
            f"({_first_line(error)}). Unset HF_HUB_OFFLINE, or load it on a machine with network "
            "access and copy the cache (HF_HOME)"
        ) from error
    except ImportError as error:
        raise ValueError(f"tasks: {name!r} needs more packages: {error}") from error
    if name in found["groups"] or name in found["tasks"]:
        return [LoadedTask(name, found)]
    alone: dict[str, Any] = {"groups": {}, "group_map": {}}
    return [
        LoadedTask(leaf, {"tasks": {leaf: task}, **alone}) for leaf, task in found["tasks"].items()
    ]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
