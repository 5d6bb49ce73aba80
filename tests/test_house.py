"""The rules of the house: who may import whom, and what stands where."""

import re
from collections import defaultdict
from collections.abc import Iterable

import pytest

from tests import house

GRAPH = house.graph()
SERVING = "vllm_loopus.serving"
# What each folder of `serving/` may import of the others. A step of the way of a request imports
# what comes before it; the messages between scheduler and worker stand between the two.
SERVING_RULES = {
    "knobs": set(),
    "compat": set(),
    "messages": {"knobs"},
    "step": {"knobs", "messages"},
    "model": {"knobs"},
    "core": {"compat", "knobs", "messages", "model"},
    "worker": {"knobs", "messages", "step", "model"},
    "runners": {"compat", "knobs", "messages", "step", "model", "worker"},
    "frontend": {"knobs", "messages", "model"},
    "hooks": {"knobs", "messages", "model", "runners", "frontend"},
}
# The same for the package: `serving` stands on the transformers side, tools stand on both.
BASE = {
    "extras",
    "files",
    "backbones",
    "base_attention",
    "loop_fields",
    "base_config",
    "config",
    "aliases",
}
PACKAGE_RULES = {
    "files": set(),
    "backbones": set(),
    "base_attention": {"backbones"},
    "loop_fields": set(),
    "base_config": {"backbones", "base_attention", "loop_fields"},
    "config": {"base_config", "backbones", "base_attention", "loop_fields"},
    "aliases": {"files"},
    "modeling": BASE,
    "architectures": {*BASE, "modeling"},
    "serving": {*BASE, "modeling", "architectures"},
    # `architectures/*/vllm_model.py`: named in a record, imported by nobody.
    "vllm_model": {*BASE, "modeling", "architectures", "serving"},
    "plugin": {"aliases", "architectures", "serving"},
    "extras": set(),
    "recast": {*BASE, "modeling", "architectures"},
    "training": {*BASE, "modeling", "architectures", "recast"},
    "trace": {*BASE, "modeling", "architectures"},
    "tiny": {*BASE, "modeling", "recast", "training"},
    "smollm2": {*BASE, "recast", "training"},
    "batch": {*BASE, "architectures", "serving"},
    "deploy": {*BASE, "architectures", "serving"},
    "evaluation": {*BASE, "modeling", "architectures", "recast", "serving", "plugin", "tiny"},
    "bench": {*BASE, "modeling", "architectures", "serving", "trace", "tiny"},
    "__init__": {"architectures", "config", "modeling", "serving"},
}


def part(module: str, under: str) -> str:
    """The folder or file directly under a package that a module is in. The vLLM models of the
    architectures are a part of their own, because they stand on `serving`."""
    if module.startswith("vllm_loopus.architectures.") and module.endswith(".vllm_model"):
        return "vllm_model"
    return module.removeprefix(under).lstrip(".").split(".")[0] or "__init__"


def edges(under: str) -> dict[str, set[str]]:
    """Part -> other parts of the package `under` that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in GRAPH.items():
        if module.startswith(under):
            parts = {part(target, under) for target in targets if target.startswith(under)}
            found[part(module, under)] |= parts - {part(module, under), "__init__"}
    return found


@pytest.mark.parametrize(
    ("under", "rules"), [(SERVING, SERVING_RULES), ("vllm_loopus", PACKAGE_RULES)]
)
def test_imports_go_one_way(under: str, rules: dict[str, set[str]]) -> None:
    found = edges(under)
    if under == "vllm_loopus":
        found.pop("cli")  # may import everything, and nothing imports it
        assert not any("cli" in targets for targets in found.values())
        assert not any("vllm_model" in targets for targets in found.values())
    assert not house.circle(rules), "the rules themselves"
    assert found.keys() <= rules.keys() | {"__init__"}
    wrong = {name: targets - rules.get(name, set()) for name, targets in found.items()}
    assert not {name: targets for name, targets in wrong.items() if targets}


def test_there_is_no_circle_of_modules() -> None:
    assert house.circle(GRAPH) is None


def test_a_circle_would_be_found() -> None:
    assert house.circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


@pytest.mark.parametrize("folder", ["messages", "step"])
def test_messages_and_step_import_nothing_of_ours_but_each_other_and_knobs(folder: str) -> None:
    allowed = tuple(f"{SERVING}.{name}" for name in (folder, *SERVING_RULES[folder]))
    for name, targets in GRAPH.items():
        if name.startswith(f"{SERVING}.{folder}"):
            assert all(target.startswith(allowed) for target in targets), name


@pytest.mark.parametrize("folder", ["messages", "step"])
def test_messages_and_step_have_no_tensors(folder: str) -> None:
    for name, file in house.files().items():
        if name.startswith(f"{SERVING}.{folder}"):
            outside = {target.split(".")[0] for target in house.imported(file, ())}
            assert not outside & {"torch", "vllm", "transformers"}, name


def test_the_transformers_side_does_not_import_vllm() -> None:
    """Neither do the modules that it imports. Traces are read and drawn without it too."""
    without = {*BASE, "modeling", "architectures", "recast", "training"}
    for name in reachable(n for n in GRAPH if part(n, "vllm_loopus") in without):
        assert "vllm" not in outside(name, at_once=False), name
    for name in reachable(n for n in GRAPH if part(n, "vllm_loopus") == "trace"):
        assert "vllm" not in outside(name, at_once=True), name


def reachable(names: Iterable[str]) -> set[str]:
    """These modules of the package and those that they import."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += GRAPH[name]
    return found


def outside(name: str, at_once: bool) -> set[str]:
    """The packages that a module of ours imports."""
    return {target.split(".")[0] for target in house.imported(house.files()[name], (), at_once)}


def test_serving_has_folders_only() -> None:
    folder = house.PACKAGE / "serving"
    assert [file.name for file in folder.glob("*.py")] == ["__init__.py"]
    assert {child.name for child in folder.iterdir() if child.is_dir()} - {"__pycache__"} == set(
        SERVING_RULES
    )


def test_only_the_records_know_architectures() -> None:
    """Serving asks `architecture_of`; a config class is named in its record and in its model."""
    for name, file in house.files().items():
        if name.startswith(SERVING) and not name.startswith(f"{SERVING}.model.loopus"):
            assert not re.search(r"\bLoopUSConfig\b", file.read_text()), name


def test_modules_are_of_a_size_one_reads() -> None:
    long = {n: len(f.read_text().splitlines()) for n, f in house.files().items()}
    assert not {name: lines for name, lines in long.items() if lines > 500}


def test_every_package_says_what_it_is_for() -> None:
    for name, file in house.files().items():
        assert file.read_text().lstrip().startswith('"""'), name
