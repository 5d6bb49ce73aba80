"""`loopus-tiny`, the embedded model: its synthetic tasks, tokenizer, training and evaluation."""

from vllm_loopus.extras import need

need("the training of loopus-tiny", "train", "matplotlib", "rich", "tqdm", "typer")
