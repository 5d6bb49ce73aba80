"""What an installation brings: serving needs little, and a tool names what it lacks."""

import ast
import builtins
import importlib
import importlib.util
import io
import pkgutil
import sys
import tomllib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests import house

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SERVING = ("__init__", "aliases", "architectures", "backbones", "base_attention", "config",
           "extras", "files", "modeling", "plugin", "serving")  # fmt: skip
# With extras of their own, or only named for types.
LAZY = {"vllm": "cpu, cuda", "ray": "ray: vLLM's executor", "fastapi": "types; vLLM's own"}
BLOCKED = ("accelerate", "datasets", "jinja2", "lm_eval", "matplotlib", "psutil", "pydantic",
           "rich", "scipy", "tqdm", "typer", "yaml")  # fmt: skip


def distributions(requirements: list[str]) -> set[str]:
    """Names of distributions, with those of our own extras in them."""
    found = set()
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name == "vllm-loopus":
            for extra in requirement.extras:
                found |= distributions(EXTRAS[extra])
        else:
            found.add(requirement.name)
    return found


def modules_of(names: set[str]) -> set[str]:
    """The top-level modules that installed distributions bring."""
    brought = metadata.packages_distributions()
    known = {module: {d.lower().replace("_", "-") for d in of} for module, of in brought.items()}
    return {module for module, of in known.items() if of & names}


def test_serving_imports_what_is_installed_with_it_and_nothing_else() -> None:
    imported = {
        target.split(".")[0]
        for name, file in house.files().items()
        if name.removeprefix("vllm_loopus").lstrip(".").split(".")[0] in (*SERVING, "")
        for target in house.imported(file, ())
    }
    outside = imported - set(sys.stdlib_module_names) - {"vllm_loopus"} - LAZY.keys()
    installed = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert outside <= modules_of(installed)
    assert modules_of(installed) & outside, "the names of modules were found"
    unused = {name for name in installed if not modules_of({name}) & outside}
    assert not unused


def import_all_of_serving() -> str:
    """Imports every module of the serving side in a process where `BLOCKED` cannot be imported by
    modules of ours; the error of a tool that is then imported."""
    for name in [name for name in sys.modules if name.startswith("vllm_loopus")]:
        del sys.modules[name]
    original = builtins.__import__

    def guarded(name: str, names: Any = None, *rest: Any) -> Any:
        # What vLLM and transformers import is theirs, also where it is there already.
        ours = (names or {}).get("__name__", "").startswith("vllm_loopus")
        if ours and name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return original(name, names, *rest)

    builtins.__import__ = guarded
    importlib.import_module("vllm_loopus.plugin").register()
    serving = importlib.import_module("vllm_loopus.serving")
    for found in pkgutil.walk_packages(serving.__path__, "vllm_loopus.serving."):
        importlib.import_module(found.name)
    try:
        importlib.import_module("vllm_loopus.recast.convert")
    except ModuleNotFoundError as error:
        return str(error)
    return ""


def test_serving_is_imported_without_the_tools(in_fork: Callable[..., str]) -> None:
    assert "is blocked" in in_fork(import_all_of_serving)


def needed() -> list[tuple[str, str, list[str]]]:
    """Package, extra and modules of every `need(...)`."""
    found = []
    for name, file in house.files().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "need":
                _, extra, *modules = (ast.literal_eval(argument) for argument in node.args)
                found.append((name, extra, modules))
    return found


@pytest.mark.parametrize(("name", "extra", "modules"), needed())
def test_an_extra_brings_what_is_asked_for(name: str, extra: str, modules: list[str]) -> None:
    assert set(modules) <= modules_of(distributions(EXTRAS[extra]))


def test_tools_import_what_their_extra_brings() -> None:
    """Every library that a package of tools imports is in the extra that it asks for."""
    base = distributions([*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["cuda"]])
    asked = {name: extra for name, extra, _ in needed() if name != "vllm_loopus.cli.entry"}
    asked["vllm_loopus.cli"] = "tools"
    optional = {"datasets", "xformers", "msgspec"}  # asked for where they are used
    for package, extra in asked.items():
        brought = modules_of(base | distributions(EXTRAS[extra])) | optional | LAZY.keys()
        for name, file in house.files().items():
            if name == package or name.startswith(f"{package}."):
                imported = {target.split(".")[0] for target in house.imported(file, ())}
                outside = imported - set(sys.stdlib_module_names) - {"vllm_loopus"}
                if not name.endswith("original_worker"):  # runs beside the original's code
                    assert outside <= brought, name


CASES = [
    ("typer", ["--help"], "tools"),
    ("matplotlib", ["recast", "loopus-tiny-base", "--out", "nowhere"], "recast"),
    ("matplotlib", ["trace", "loopus-tiny", "--prompt", "1+1="], "trace"),
    ("yaml", ["train", "configs/loopus-tiny.yaml"], "train"),
    ("lm_eval", ["eval", "loopus-tiny", "--tasks", "tiny"], "eval"),
    ("scipy", ["bench", "--plan", "tiny"], "bench"),
    ("ray", ["batch", "in.jsonl", "out.jsonl"], "ray"),
]


def told_without(module: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of the command `vllm-loopus` where `module` is not installed."""
    extras = importlib.import_module("vllm_loopus.extras")
    original = importlib.util.find_spec
    extras.find_spec = lambda name, *rest: None if name == module else original(name, *rest)
    sys.argv = ["vllm-loopus", *arguments]
    output = io.StringIO()
    code = 0
    with redirect_stdout(output), redirect_stderr(output):
        try:
            importlib.import_module("vllm_loopus.cli.entry").main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, output.getvalue()


@pytest.mark.parametrize(("module", "arguments", "extra"), CASES)
def test_what_is_missing_is_named_with_its_command(
    in_fork: Callable[..., tuple[int, str]], module: str, arguments: list[str], extra: str
) -> None:
    code, output = in_fork(told_without, module, arguments)
    assert f"needs {module}" in output, output
    assert f"pip install 'vllm-loopus[{extra}]'" in output
    assert code == 2 and "Traceback" not in output
