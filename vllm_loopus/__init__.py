"""Serve looped language models (LoopUS) on vLLM."""

__version__ = "0.1.0"
