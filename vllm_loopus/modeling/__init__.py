"""The LoopUS model in transformers, used for training, recasting and reference answers.

Nothing here imports vLLM. The serving side uses the gate, the confidence head, the halting rule
and the checkpoint tensor names from this package.
"""
