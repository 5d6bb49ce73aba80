"""Relaxed recursive transformers (Bae et al., arXiv 2410.20672): tied layers, LoRA by loop."""
