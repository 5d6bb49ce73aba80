"""Imported once by the process that `tests/forks.py` makes forks of: vLLM, and nothing of ours."""

import os

os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks share the cores

import vllm.v1.worker.cpu_worker  # noqa: F401

from tests import quick

quick.starts()
