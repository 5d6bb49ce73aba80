"""Short names for looped models, resolved by vLLM's redirect hook.

`LLM("loopus-qwen3-4b")` looks, in this order, for a path of that name, a folder or repository that
the user registered (`vllm-loopus alias add`), a checkpoint embedded in this package, and a
published repository. vLLM reads the aliases from the file named by `VLLM_MODEL_REDIRECT_PATH`.
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
# The looped model, and the plain model it was recast from.
EMBEDDED = {name: CHECKPOINTS / name for name in ("loopus-tiny", "loopus-tiny-base")}
# Repositories published by the authors (from their model listing, 2026-11-23).
PUBLISHED = {
    "loopus-qwen3-1.7b": "Thrillcrazyer/Qwen3_1.7B_LoopUS",
    "loopus-qwen3-8b": "Thrillcrazyer/Qwen3-8B_LoopUS",
    "loopus-phi-4": "Thrillcrazyer/Phi4_LoopUS",
    "ouro-1.4b": "ByteDance/Ouro-1.4B",
    "ouro-2.6b": "ByteDance/Ouro-2.6B",
    "ouro-1.4b-thinking": "ByteDance/Ouro-1.4B-Thinking",
    "ouro-2.6b-thinking": "ByteDance/Ouro-2.6B-Thinking",
}
# Models of the paper without known published weights: name -> base model to recast.
UNPUBLISHED = {
    "loopus-qwen3-4b": "Qwen/Qwen3-4B",
    "loopus-tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
PREFIXES = ("loopus-", "ouro-")
REDIRECT_VARIABLE = "VLLM_MODEL_REDIRECT_PATH"
# The redirect file configured by the user, which ours replaces. Child processes inherit both.
CONFIGURED_VARIABLE = "LOOPUS_CONFIGURED_REDIRECTS"
FILE_PREFIX = "vllm-loopus-redirects-"


class AliasError(ValueError):
    """An alias cannot be used; the message says how to fix it."""


def registry_file() -> Path:
    """The file that stores the user's aliases."""
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
        raise AliasError(
            f"{file} must contain a JSON object of names and paths; correct or delete it"
        )
    return aliases


def known_aliases() -> dict[str, str]:
    """All aliases: name -> folder or repository. The user's aliases take precedence."""
    embedded = {name: str(path) for name, path in EMBEDDED.items()}
    return {**PUBLISHED, **embedded, **user_aliases()}


def add_alias(name: str, target: str) -> None:
    """Registers `name` for a checkpoint folder or an `owner/name` repository.

    Raises `AliasError` for an invalid name or target.
    """
    if not name or "/" in name or name != name.strip() or any(c.isspace() for c in name):
        raise AliasError(f"name={name!r} must be one word without '/'")
    folder = Path(target).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise AliasError(f"target={target!r} has no config.json; give a checkpoint folder")
        target = str(folder.resolve())
    elif target.count("/") != 1 or target.startswith((".", "/", "~")):
        raise AliasError(f"target={target!r} is neither a folder nor a repository (owner/name)")
    _write(registry_file(), {**user_aliases(), name: target})


def remove_alias(name: str) -> None:
    """Removes one of the user's aliases. Raises `AliasError` if it does not exist."""
    aliases = user_aliases()
    if name not in aliases:
        own = ", ".join(sorted(aliases)) or "none"
        raise AliasError(f"name={name!r} is not one of your aliases ({own})")
    del aliases[name]
    _write(registry_file(), aliases)


def install_redirects() -> None:
    """Points vLLM's redirect hook at a file with all aliases. May be called repeatedly.

    Entries of a redirect file that the user configured take precedence over ours.
    """
    table = {name: to for name, to in known_aliases().items() if not Path(name).exists()}
    current = os.environ.get(REDIRECT_VARIABLE, "")
    if not Path(current).name.startswith(FILE_PREFIX):
        os.environ[CONFIGURED_VARIABLE] = current
    configured = Path(os.environ.get(CONFIGURED_VARIABLE, ""))
    if configured.is_file():
        table.update(_read_redirects(configured))
    text = json.dumps(table, indent=1, sort_keys=True)
    # The name depends on the content, so that processes starting together do not interfere.
    name = f"{FILE_PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    inherited, cached = Path(current), _cache_folder() / name
    for file in (inherited, cached):
        if file.name == name and _is_trusted(file, text):
            os.environ[REDIRECT_VARIABLE] = str(file)
            return
    with suppress(OSError):
        _write(cached, table)
    file = cached
    if not _is_trusted(cached, text):  # the cache folder is not writable, or writable by others
        file = _private_folder() / name
        _write(file, table)
    os.environ[REDIRECT_VARIABLE] = str(file)


def _is_trusted(file: Path, text: str) -> bool:
    """Whether a file contains `text` and no other user can change it."""
    try:
        status, folder = file.lstat(), file.parent.stat()
        own = status.st_uid == folder.st_uid == os.getuid() and stat.S_ISREG(status.st_mode)
        writable = (status.st_mode | folder.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
        return own and not writable and file.read_text() == text
    except OSError:
        return False


def _private_folder() -> Path:
    """A new folder that only this user can access; it is deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-loopus-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def explain_unknown_alias(model: str) -> None:
    """Raises `AliasError` listing the known aliases if `model` looks like an alias but is none."""
    if not model.startswith(PREFIXES) or "/" in model or Path(model).exists():
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
        f"{why}. Register your own checkpoint folder or repository with\n"
        f"  vllm-loopus alias add {model} PATH\nKnown aliases:\n{known}"
    )


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-loopus"


def _read_redirects(file: Path) -> dict[str, str]:
    """Reads a redirect file in either of vLLM's formats: JSON, or lines of `name target`."""
    text = file.read_text()
    try:
        return dict(json.loads(text))
    except ValueError:
        pairs = (line.split() for line in text.splitlines())
        return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _write(file: Path, content: dict[str, str]) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1, sort_keys=True))
    file.chmod(0o600)
