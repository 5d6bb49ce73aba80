"""Memory bandwidth and matrix rate."""

from typing import Any

from vllm_loopus.bench.process import Worker, package_worker
from vllm_loopus.bench.setup import Setup

ROWS = (1, 4, 16, 64, 256)


def measure(setup: Setup) -> dict[str, Any]:
    """Bytes and operations a second, see `workers/machine_worker.py`."""
    model = setup.plan.model
    worker = Worker("machine", package_worker("machine_worker"), setup.folder / "machine.log")
    try:
        found: dict[str, Any] = worker.call(
            "measure",
            dtype=setup.dtype,
            device=setup.device,
            hidden=model.hidden,
            intermediate=model.intermediate,
            rows=list(ROWS),
        )
    finally:
        worker.close()
    return found
