"""Benchmarks: engines side by side on one machine, as ratios with their spread."""

from vllm_loopus.extras import need

need("vllm-loopus bench", "bench", "jinja2", "matplotlib", "psutil", "scipy")
