"""Converts a pretrained model into a LoopUS checkpoint."""

from vllm_loopus.extras import need

need("vllm-loopus recast", "recast", "accelerate", "jinja2", "matplotlib", "tqdm")
