"""The transformers side of a LoopUS model: training, recasting and reference answers use it.

Nothing here imports vLLM. The serving side shares the gate, the confidence head, the halting rule
and the checkpoint names.
"""
