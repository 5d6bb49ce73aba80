"""Evaluation of looped models and their base models with lm-evaluation-harness."""

from vllm_loopus.extras import need

need("vllm-loopus eval", "eval", "datasets", "lm_eval", "tqdm")
