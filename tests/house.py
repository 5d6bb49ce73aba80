"""Who imports whom in the package, read from the source: functions and `TYPE_CHECKING` included."""

import ast
from collections.abc import Container, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vllm_loopus"


def module_name(file: Path) -> str:
    """The dotted name of a file of the package."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files() -> dict[str, Path]:
    """Every module of the package."""
    return {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(file: Path, known: Container[str], at_once: bool = False) -> Iterator[str]:
    """What a file imports; `at_once`: when it is imported itself. `from package import module` is
    an import of the module, not of the package."""
    tree = ast.parse(file.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in known else str(node.module)


def graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    known = files()
    return {
        name: {target for target in imported(file, known) if target in known} - {name}
        for name, file in known.items()
    }


def circle(modules: dict[str, set[str]]) -> list[str] | None:
    """A circle of imports, None if there is none."""
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None
