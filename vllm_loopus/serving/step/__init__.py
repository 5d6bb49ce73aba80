"""The logic of one engine step: plain Python, no tensors. The property tests run it alone."""
