"""Which of vLLM's model runners LoopUS models run on."""

import os

from vllm import envs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

logger = init_logger("vllm.loopus")

CHOICE = "VLLM_USE_V2_MODEL_RUNNER"  # what vLLM itself reads


def select_runner() -> None:
    """Settles the runner before vLLM asks for it: V1, where our tests run, if the user says
    nothing.

    Raises `ValueError` where V2 is asked for and cannot run. Called once a config; says so once.
    """
    if envs.VLLM_USE_V2_MODEL_RUNNER and not HAS_TRITON:
        raise ValueError(f"{CHOICE}=1 needs Triton, which this vLLM does not have; unset it")
    if envs.VLLM_USE_V2_MODEL_RUNNER is None:
        os.environ[CHOICE] = "0"
    logger.info_once("LoopUS models run on %s", runner_in_use(bool(envs.VLLM_USE_V2_MODEL_RUNNER)))


def runner_in_use(is_v2: bool) -> str:
    """The runner, why it was taken, and how far it is verified."""
    if is_v2:
        return (
            f"vLLM's V2 model runner, as {CHOICE}=1 asks; our tests have seen it with Triton's "
            "interpreter on a CPU only: docs/gpu.md"
        )
    if current_platform.is_cpu():
        return "vLLM's V1 model runner, the one our tests run on"
    return (
        "vLLM's V1 model runner, the one our tests run on, but on CPUs: no GPU has been seen, "
        "nothing is verified here: docs/gpu.md"
    )
