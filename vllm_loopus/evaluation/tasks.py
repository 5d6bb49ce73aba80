"""Tasks of lm-evaluation-harness, ours among them, loaded before any engine starts."""

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

OURS = Path(__file__).with_name("tiny_tasks")
FEWSHOT_SEED = 1234  # lm-eval's default
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, in its text


@dataclass(frozen=True)
class LoadedTask:
    """A task or group of tasks: `found` is what lm-eval loaded, ready to be evaluated."""

    name: str
    found: Mapping[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """The tasks in it, itself where it is no group."""
        return list(self.found["tasks"].values())

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of its tasks."""
        names = (entry["metric"] for leaf in self.leaves for entry in leaf.config.metric_list or ())
        return list(dict.fromkeys(str(name) for name in names))

    def fingerprint(self, limit: int | None) -> str:
        """Of how documents are put and scored, and of the documents asked."""
        digest = hashlib.sha256()
        for leaf in self.leaves:
            config = dict(leaf.dump_config())
            metadata = config.pop("metadata", None) or {}
            config["version"] = metadata.get("version")  # the rest says where the file lies
            digest.update(ADDRESS.sub("", _json(config)).encode())
            for index, document in enumerate(leaf.eval_docs):
                if limit is not None and index >= limit:
                    break
                digest.update(_json(document).encode())
        return digest.hexdigest()


def load_tasks(
    names: Sequence[str], num_fewshot: int | None = None, include: Path | None = None
) -> list[LoadedTask]:
    """`num_fewshot`: instead of each task's own number of examples. `include`: a folder with task
    definitions of the user's.

    Raises `ValueError` for a task nobody knows, and for one whose data cannot be had here.
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
                f"tasks: {name!r} is no task of lm-evaluation-harness and no preset "
                f"({', '.join(PRESETS)}); {hint}"
            )
    loaded = [task for name in names for task in _load(manager, name)]
    for leaf in (leaf for task in loaded for leaf in task.leaves):
        own = leaf.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # 0 is a task's last word
            leaf.set_config("num_fewshot", num_fewshot or own or 0)
        leaf.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


@cache
def _manager(include: Path | None, lm_evals: bool) -> Any:
    """Knows our tasks, the user's, and lm-evaluation-harness's own, whose index takes a while."""
    folders = [OURS, *([include] if include else [])]
    return TaskManager(include_path=folders, include_defaults=lm_evals)


def _load(manager: Any, name: str) -> list[LoadedTask]:
    """One, but for a tag, which is several tasks under one name."""
    try:
        found = manager.load([name])
    except (OSError, DatasetsError, HfHubHTTPError) as error:  # no network is an OSError
        raise ValueError(
            f"tasks: the data of {name!r} is not on this machine and could not be fetched "
            f"({_first_line(error)}). Unset HF_HUB_OFFLINE, or load it once where there is a "
            "network and copy the cache (HF_HOME)"
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
