"""The checks of `doctor`. Each yields findings and does not raise.

vLLM is imported in a separate process (`probe.py`), so that a failing import is a finding too.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from vllm_loopus import __version__, aliases
from vllm_loopus.plugin import BELOW_VLLM, LOWEST_VLLM, installed_vllm, unsupported_version

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "loopus"
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
PROBE_SECONDS = 180
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Finding:
    """The result of a check. `status`: ok, note, warning (works, but perhaps not as intended) or
    error (does not work)."""

    check: str
    status: str
    found: str
    fix: str = ""


def examine(model: str) -> list[Finding]:
    """Runs all checks, in the order in which they would affect a start."""
    findings = [*versions(), *entry_point()]
    if installed_vllm() is not None:
        findings += [*companions(), *processes(), *devices(), *names(), *variables()]
        findings += memory(model)
    return findings


def versions() -> Iterator[Finding]:
    found = installed_vllm()
    message = unsupported_version()
    shown = f"vllm-loopus {__version__}, Python {sys.version.split()[0]}"
    for name in ("torch", "transformers"):
        shown += f", {name} {metadata.version(name)}"
    if found is not None:
        shown += f", {found[0]} {found[1]}"
        if message is None:
            shown += f" (tested: >={LOWEST_VLLM},<{BELOW_VLLM})"
    yield Finding("versions", OK if message is None else ERROR, shown, message or "")
    if found is not None and not _installed("vllm"):
        yield Finding(
            "vllm metadata",
            ERROR,
            f"{found[0]} is installed but no distribution is named vllm, so the command `vllm` "
            "fails with PackageNotFoundError",
            "pip install --no-deps ./requirements/vllm-metadata (in a clone of vllm-loopus)",
        )


def entry_point() -> Iterator[Finding]:
    points = [p for p in metadata.entry_points(group=PLUGIN_GROUP) if p.name == PLUGIN]
    targets = {point.value for point in points}
    if not points:
        yield Finding(
            "entry point",
            ERROR,
            f"no plugin {PLUGIN!r} in the group {PLUGIN_GROUP}, so vLLM does not load vllm-loopus",
            "install the package (pip install -e .); having its folder on the path is not enough",
        )
    elif targets != {"vllm_loopus.plugin:register"}:
        yield Finding(
            "entry point",
            ERROR,
            f"the plugin {PLUGIN!r} is also defined by another package: "
            f"{', '.join(sorted(targets))}",
            "uninstall the other package",
        )
    else:
        yield Finding("entry point", OK, f"{PLUGIN} -> {points[0].value}")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        yield Finding(
            "VLLM_PLUGINS",
            ERROR,
            f"VLLM_PLUGINS={allowed!r} does not include {PLUGIN!r}",
            f"unset it, or set VLLM_PLUGINS={','.join(filter(None, [allowed, PLUGIN]))}",
        )


def companions() -> Iterator[Finding]:
    """Packages that vLLM needs and that are missing, or that prevent its import."""
    for name in ("openai", "prometheus_client", "fastapi"):
        if util.find_spec(name) is None:
            fix = f"pip install {name}"
            yield Finding("packages", ERROR, f"{name} is missing: `vllm serve` needs it", fix)
    for name in CUDA_ONLY:
        if util.find_spec(name) is None:
            continue
        error = _run("-c", f"import {name}").stderr.strip()
        if error:
            yield Finding(
                "packages",
                ERROR,
                f"{name} cannot be imported with torch {metadata.version('torch')}, and vLLM "
                f"imports it if it is installed: {error.splitlines()[-1]}",
                f"pip uninstall {name} (text models do not need it)",
            )


def processes() -> Iterator[Finding]:
    """Whether the plugin is loaded in the front end and in a process spawned like vLLM's."""
    try:
        result = _run("-m", "vllm_loopus.cli.probe")
    except subprocess.TimeoutExpired:
        yield Finding("processes", ERROR, f"vLLM did not load within {PROBE_SECONDS} s")
        return
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        fix = "read the traceback of: python -m vllm_loopus.cli.probe"
        yield Finding("processes", ERROR, f"vLLM or the plugin cannot be loaded: {last}", fix)
        return
    for process, state in json.loads(result.stdout.splitlines()[-1]).items():
        good = state["registered"] and state["patches"] == state["of"]
        shown = (
            f"model {'registered' if state['registered'] else 'not registered'}, "
            f"{state['patches']} of {state['of']} patches"
        )
        yield Finding(f"plugin in {process}", OK if good else ERROR, shown)


def devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        yield Finding("device", NOTE, f"GPU: {name}; LoopUS models run on vLLM's V1 model runner")
    else:
        isa = torch.backends.cpu.get_cpu_capability()
        yield Finding("device", OK, f"CPU: {os.cpu_count()} logical, {isa}; V1 model runner")
        if not isa.startswith("AVX512"):
            yield Finding(
                "device",
                NOTE,
                "no AVX-512: bf16 is emulated, which is slow",
                "--dtype float32 may be faster",
            )


def names() -> Iterator[Finding]:
    """Aliases, the redirect file, and folders that hide an alias."""
    try:
        own, known = aliases.user_aliases(), aliases.known_aliases()
    except aliases.AliasError as error:
        yield Finding("aliases", ERROR, str(error))
        return
    gone = [name for name, to in own.items() if to.startswith("/") and not Path(to).is_dir()]
    for name in gone:
        fix = f"vllm-loopus alias add {name} PATH, or vllm-loopus alias remove {name}"
        yield Finding("aliases", WARNING, f"{name} is {own[name]}, which does not exist", fix)
    for name in known:
        if Path(name).exists():
            yield Finding(
                "aliases",
                WARNING,
                f"./{name} exists here and takes precedence over the alias {name}",
                "start in another folder, or rename it",
            )
    yield Finding("aliases", OK, f"{len(known)} names, {len(own)} of them yours")
    file = os.environ.get(aliases.REDIRECT_VARIABLE)
    if file and not Path(file).is_file():
        yield Finding(
            "redirect file",
            WARNING,
            f"{aliases.REDIRECT_VARIABLE}={file} does not exist",
            "unset it; aliases do not need it",
        )
    elif file:
        yield Finding("redirect file", OK, f"{file}: its entries take precedence over aliases")


def variables() -> Iterator[Finding]:
    """Environment variables that LoopUS models or vLLM do not support."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        triton = util.find_spec("triton") is not None
        yield Finding(
            "VLLM_USE_V2_MODEL_RUNNER",
            WARNING if triton else ERROR,
            "not verified on a GPU" if triton else "vLLM's V2 model runner needs Triton",
            "unset VLLM_USE_V2_MODEL_RUNNER: LoopUS models then run on the V1 model runner",
        )
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        shown = "set: models on the hub can only be served if they are in the cache"
        yield Finding("HF_HUB_OFFLINE", NOTE, shown)
    given = os.environ.get(CPU_CACHE)
    if given and not given.isdigit():
        fix = "give a whole number, or --kv-cache-memory-bytes for less than 1 GiB"
        yield Finding(CPU_CACHE, ERROR, f"{CPU_CACHE}={given!r} is not a number of GiB", fix)


def memory(model: str) -> Iterator[Finding]:
    """Whether the K/V of one sequence fits in memory, on a CPU."""
    from vllm_loopus.cli.info import estimate_kv, load_config
    from vllm_loopus.serving.hooks.cpu_memory import free_cpu_memory

    given = os.environ.get(CPU_CACHE, "")
    gib = float(given) if given.isdigit() and int(given) else None
    try:
        config = load_config(model)
        estimate = estimate_kv(config, gib)
    except ValueError as error:
        yield Finding("K/V memory", ERROR, str(error))
        return
    free = free_cpu_memory()[0] / 2**30
    if gib is not None and gib > free:
        shown = f"{CPU_CACHE}={given} GiB, but {free:.1f} GiB are free: vLLM will not start"
        yield Finding("K/V memory", ERROR, shown, "set a smaller value, or unset it")
    depth, fit = config.max_loops, estimate.sequences[config.max_loops]
    size, gib = estimate.bytes_a_token[depth] / 1024, estimate.memory_bytes / 2**30
    shown = (
        f"{model}: {size:.1f} KiB per token at depth {depth} ({estimate.dtype}); {fit:.1f} "
        f"sequences of {estimate.max_model_len} tokens fit in {gib:.1f} GiB"
    )
    if fit >= 1:
        yield Finding("K/V memory", OK, shown)
        return
    longest = int(fit * estimate.max_model_len)
    yield Finding(
        "K/V memory",
        WARNING,
        shown,
        f"set --max-model-len {max(longest // 128 * 128, 128)}, fewer loops (--hf-overrides "
        f"'{{\"max_loops\": ...}}') or more memory ({CPU_CACHE})",
    )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=PROBE_SECONDS
    )
