"""Faults and load against a real `vllm serve`, from an outside client: `python -m tests.load`."""
