"""Post-training of LoopUS models and recursive transformers, and of plain models as a control.

Based on transformers' Trainer. Does not import vLLM.
"""

from vllm_loopus.extras import need

need("vllm-loopus train", "train", "accelerate", "datasets", "jinja2", "pydantic", "tqdm", "yaml")
