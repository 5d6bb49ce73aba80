"""Optional dependencies: each part of the package checks that its extra is installed.

`pip install vllm-loopus` installs what serving imports. The tools need more, and report missing
libraries when they are imported.
"""

from importlib.util import find_spec


class MissingExtraError(ModuleNotFoundError):
    """A part of the package needs libraries of an extra that are not installed."""


def need(part: str, extra: str, *modules: str) -> None:
    """Raises `MissingExtraError` with the install command if any of `modules` is not installed.

    `part`: the part of the package that needs them. `extra`: their extra in pyproject.toml.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"{part} needs {', '.join(missing)}, which is not installed; "
            f"pip install 'vllm-loopus[{extra}]'",
            name=missing[0],
        )
