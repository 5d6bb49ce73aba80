"""Post-training of LoopUS models, and of plain models as their control.

Builds on transformers' Trainer; imports no vLLM.
"""

from vllm_loopus.extras import need

need("vllm-loopus train", "train", "accelerate", "datasets", "jinja2", "pydantic", "tqdm", "yaml")
