"""`loopus-tiny`: the embedded model, its synthetic task, tokenizer and training."""

from vllm_loopus.extras import need

need("the training of loopus-tiny", "train", "matplotlib", "rich", "tqdm", "typer")
