"""Where vLLM is told about looped models: its hooks, and patches where it has none."""
