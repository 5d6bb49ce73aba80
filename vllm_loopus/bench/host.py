"""When, where and by which command something was measured."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch


def about_run(command: Sequence[str]) -> dict[str, Any]:
    """What every report begins with. `date`: UTC, to the minute. `load_at_start`: processes that
    wanted a core over the last minute. `memory`: bytes."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "command": " ".join(command),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_at_start": psutil.getloadavg()[0],
        "memory": psutil.virtual_memory().total,
    }


def machine() -> str:
    """In words: the GPU, or the CPU with its vector instructions; the number of cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {psutil.cpu_count()} cores"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
    flags = next((text for text in lines if text.startswith("flags")), "")
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512"}
    vectors = next((name for flag, name in known.items() if flag in flags), None)
    vectors = vectors or ("AVX2" if "avx2" in flags else "no AVX2")
    name = names[0] if names else platform.machine()
    return f"{name} ({vectors}), {psutil.cpu_count()} cores, {platform.system()}"
