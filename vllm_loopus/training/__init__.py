"""Post-training of LoopUS models, and of plain models as their control.

Builds on transformers' Trainer; imports no vLLM.
"""
