"""Between vLLM's workers and model runners and the loop: one adapter for each runner."""
