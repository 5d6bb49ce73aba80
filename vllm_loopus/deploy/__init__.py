"""`vllm-loopus deploy`: a Ray Serve LLM application of N engines.

`router` sends requests where the least loop budget is outstanding, `app` writes the application.
"""

from vllm_loopus.extras import need

need("vllm-loopus deploy", "ray", "jinja2", "yaml")
