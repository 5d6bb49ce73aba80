"""The vLLM side: a LoopUS model over paged attention with K/V planes by recursion depth."""
