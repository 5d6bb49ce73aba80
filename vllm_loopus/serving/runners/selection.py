"""Which of vLLM's model runners looped models run on."""

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON

logger = init_logger("vllm.loopus")

CHOICE = "VLLM_USE_V2_MODEL_RUNNER"  # what vLLM itself reads


class V1RunnerConfig(VllmConfig):
    """A config of vLLM whose model runs on the V1 runner, whatever vLLM would choose."""

    @property
    def use_v2_model_runner(self) -> bool:
        return False


def check_runner() -> None:
    """Raises `ValueError` if the user asks for the V2 runner and it cannot run here."""
    if envs.VLLM_USE_V2_MODEL_RUNNER and not HAS_TRITON:
        raise ValueError(f"{CHOICE}=1 needs Triton, which this vLLM does not have; unset it")


def select_runner(vllm_config: VllmConfig) -> None:
    """Settles the runner of one model: V1 unless the user asks for V2.

    Other models in the process are not affected: the class of this config is changed, no variable.
    """
    if envs.VLLM_USE_V2_MODEL_RUNNER is None:
        vllm_config.__class__ = V1RunnerConfig
    logger.info_once("Looped models run on %s", runner_in_use(vllm_config.use_v2_model_runner))


def runner_in_use(is_v2: bool) -> str:
    """The runner, why it was chosen, and how far it is verified."""
    if is_v2:
        return (
            f"vLLM's V2 model runner, as {CHOICE}=1 asks; tested only with Triton's interpreter on "
            "a CPU: docs/gpu.md"
        )
    if current_platform.is_cpu():
        return "vLLM's V1 model runner, tested on CPUs"
    return "vLLM's V1 model runner, tested on CPUs only; nothing is verified on a GPU: docs/gpu.md"
