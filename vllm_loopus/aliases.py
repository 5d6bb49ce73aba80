"""Short names for looped models, resolved by vLLM's own redirect hook.

`LLM("loopus-qwen3-4b")` finds, in this order: a path of that name, the folder or repository that
the user registered (`vllm-loopus alias add`), the checkpoint embedded in this package, the
published repository. vLLM reads the table from the file named by `VLLM_MODEL_REDIRECT_PATH`.
"""

import atexit
import hashlib
import json
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from vllm_loopus.files import write_text

CHECKPOINTS = Path(__file__).parent / "checkpoints"
# The looped model, and the plain one it was cut from.
EMBEDDED = {name: CHECKPOINTS / name for name in ("loopus-tiny", "loopus-tiny-base")}
# Repositories that the authors published (read in their model listing on 2026-11-23).
PUBLISHED = {
    "loopus-qwen3-1.7b": "Thrillcrazyer/Qwen3_1.7B_LoopUS",
    "loopus-qwen3-8b": "Thrillcrazyer/Qwen3-8B_LoopUS",
    "loopus-phi-4": "Thrillcrazyer/Phi4_LoopUS",
}
# Models of the paper whose weights no known repository holds: name -> base to recast.
UNPUBLISHED = {
    "loopus-qwen3-4b": "Qwen/Qwen3-4B",
    "loopus-tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
PREFIX = "loopus-"
REDIRECT_VARIABLE = "VLLM_MODEL_REDIRECT_PATH"
# The file that was configured before ours took its place: child processes inherit both.
CONFIGURED_VARIABLE = "LOOPUS_CONFIGURED_REDIRECTS"
FILE_PREFIX = "vllm-loopus-redirects-"


class AliasError(ValueError):
    """An alias that cannot be used, with what to do about it."""


def registry_file() -> Path:
    """Where the user's own aliases are kept."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "vllm-loopus" / "aliases.json"


def user_aliases() -> dict[str, str]:
    """The user's aliases: name -> folder or repository. Raises `AliasError` for a damaged file."""
    file = registry_file()
    try:
        aliases = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise AliasError(f"{file} cannot be read ({error}); correct or delete it") from error
    if not isinstance(aliases, dict) or not all(isinstance(v, str) for v in aliases.values()):
        raise AliasError(f"{file} must hold an object of names and paths; correct or delete it")
    return aliases


def known_aliases() -> dict[str, str]:
    """Every alias that resolves: name -> folder or repository, the user's own first."""
    embedded = {name: str(path) for name, path in EMBEDDED.items()}
    return {**PUBLISHED, **embedded, **user_aliases()}


def add_alias(name: str, target: str) -> None:
    """Register `name` for a checkpoint folder or `owner/name` repository. Raises `AliasError`."""
    if not name or "/" in name or name != name.strip() or any(c.isspace() for c in name):
        raise AliasError(f"name={name!r} must be one word without '/'")
    folder = Path(target).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise AliasError(f"target={target!r} holds no config.json; give a checkpoint folder")
        target = str(folder.resolve())
    elif target.count("/") != 1 or target.startswith((".", "/", "~")):
        raise AliasError(f"target={target!r} is neither a folder nor a repository (owner/name)")
    _write(registry_file(), {**user_aliases(), name: target})


def remove_alias(name: str) -> None:
    """Forget an alias of the user's. Raises `AliasError` when there is none of that name."""
    aliases = user_aliases()
    if name not in aliases:
        own = ", ".join(sorted(aliases)) or "none"
        raise AliasError(f"name={name!r} is not one of your aliases ({own})")
    del aliases[name]
    _write(registry_file(), aliases)


def install_redirects() -> None:
    """Points vLLM's redirect hook at a file with all aliases. Safe to call again, in any process.

    A redirect file that the user configured stays in force: its entries win over ours.
    """
    table = {name: to for name, to in known_aliases().items() if not Path(name).exists()}
    current = os.environ.get(REDIRECT_VARIABLE, "")
    if not Path(current).name.startswith(FILE_PREFIX):
        os.environ[CONFIGURED_VARIABLE] = current
    configured = Path(os.environ.get(CONFIGURED_VARIABLE, ""))
    if configured.is_file():
        table.update(_read_redirects(configured))
    text = json.dumps(table, indent=1, sort_keys=True)
    # Named by its contents: processes that start together never see a file half-written.
    name = f"{FILE_PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    inherited, cached = Path(current), _cache_folder() / name
    for file in (inherited, cached):
        if file.name == name and _is_trusted(file, text):
            os.environ[REDIRECT_VARIABLE] = str(file)
            return
    with suppress(OSError):
        _write(cached, table)
    file = cached
    if not _is_trusted(cached, text):  # no home to write to, or one that others can write to
        file = _private_folder() / name
        _write(file, table)
    os.environ[REDIRECT_VARIABLE] = str(file)


def _is_trusted(file: Path, text: str) -> bool:
    """Whether a file holds `text` and nobody else can change it."""
    try:
        status, folder = file.lstat(), file.parent.stat()
        own = status.st_uid == folder.st_uid == os.getuid() and stat.S_ISREG(status.st_mode)
        writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or folder.st_mode & stat.S_IWOTH
        return own and not writable and file.read_text() == text
    except OSError:
        return False


def _private_folder() -> Path:
    """A new folder that nobody else can enter; it goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-loopus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def explain_unknown_alias(model: str) -> None:
    """Raises `AliasError` when `model` looks like an alias and is none; says what exists."""
    if not model.startswith(PREFIX) or "/" in model or Path(model).exists():
        return
    known = "\n".join(f"  {name} -> {to}" for name, to in sorted(known_aliases().items()))
    base = UNPUBLISHED.get(model)
    why = (
        f"model={model!r}: no published weights are known for this alias; recast {base} and "
        "register the result"
        if base
        else f"model={model!r} is not a known alias"
    )
    raise AliasError(
        f"{why}. Register a checkpoint folder or repository of yours with\n"
        f"  vllm-loopus alias add {model} PATH\nAliases that exist:\n{known}"
    )


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-loopus"


def _read_redirects(file: Path) -> dict[str, str]:
    """A redirect file in either of vLLM's forms: JSON, or a line `name target` each."""
    text = file.read_text()
    try:
        return dict(json.loads(text))
    except ValueError:
        pairs = (line.split() for line in text.splitlines())
        return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _write(file: Path, content: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1, sort_keys=True))
    file.chmod(0o600)
