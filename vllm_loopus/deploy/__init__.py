"""`vllm-loopus deploy`: a Ray Serve LLM application with several engines.

`app` writes the application. `router` sends each request to the engine with the least outstanding
loop budget, which `budgets` computes.
"""

from vllm_loopus.extras import need

need("vllm-loopus deploy", "ray", "jinja2", "yaml")
