"""What is not installed with the package itself: each part says which extra it needs.

`pip install vllm-loopus` brings what serving imports. Tools need more, and say so before they do
any work.
"""

from importlib.util import find_spec


class MissingExtraError(ModuleNotFoundError):
    """A part of the package needs libraries that come with an extra."""


def need(part: str, extra: str, *modules: str) -> None:
    """Raises `MissingExtraError` with the command that installs what is missing of `modules`.

    `part`: who needs them. `extra`: the one of pyproject.toml that brings them.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"{part} needs {', '.join(missing)}, which is not installed; "
            f"pip install 'vllm-loopus[{extra}]'",
            name=missing[0],
        )
