"""Traces of looped models: predictions at every depth, trajectories of states, and exit depths.

`reference` computes values with transformers. Only `engine` imports vLLM.
"""

from vllm_loopus.extras import need

need("vllm-loopus trace", "trace", "jinja2", "matplotlib")
