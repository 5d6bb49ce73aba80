"""Connects looped models to vLLM through its hooks, and through patches where it has none."""
