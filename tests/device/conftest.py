"""The programs of `benchmarks/device` stand beside one another, as on a bare machine."""

import sys
from pathlib import Path

DEVICE = Path(__file__).parents[2] / "benchmarks" / "device"
sys.path.insert(0, str(DEVICE))
