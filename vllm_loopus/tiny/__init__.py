"""`loopus-tiny`: the embedded model, its synthetic task, tokenizer and training."""
