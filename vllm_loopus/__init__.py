"""Serve looped language models (LoopUS) on vLLM.

Importing the package registers looped checkpoints with transformers' `AutoConfig` and
`AutoModelForCausalLM`. vLLM finds the package through its plugin entry point. This module does not
import vLLM.
"""

from vllm_loopus import architectures
from vllm_loopus.config import LoopUSConfig, register_released_format
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.serving.messages.exit_depths import exit_depths

__all__ = ["LoopUSConfig", "LoopUSForCausalLM", "__version__", "exit_depths"]
__version__ = "0.1.0"

architectures.register()
register_released_format()
