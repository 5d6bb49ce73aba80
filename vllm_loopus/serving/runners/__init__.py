"""Adapters between vLLM's model runners and the loop, one a runner (`runner_interface.py`)."""
