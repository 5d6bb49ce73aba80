"""Imported by the process that the processes of vLLM are forks of (`conftest.forked_processes`)."""

import os

os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # ranks share the cores

import vllm_loopus.serving.runners.worker  # noqa: F401
from tests import quick

quick.starts()
