"""Converts a pretrained model into a looped one: LoopUS, or a recursive transformer."""

from vllm_loopus.extras import need

need("vllm-loopus recast", "recast", "accelerate", "jinja2", "matplotlib", "tqdm")
