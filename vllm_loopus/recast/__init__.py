"""From a pretrained model to a LoopUS checkpoint."""
