"""Looking inside: what every depth would have said, how states move, where a workload leaves.

`reference` computes on the transformers side, `engine` alone imports vLLM.
"""

from vllm_loopus.extras import need

need("vllm-loopus trace", "trace", "jinja2", "matplotlib")
