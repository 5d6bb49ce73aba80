"""Prepares the training of `loopus-tiny`: its data, and config and tokenizer of the base model.

python -m vllm_loopus.tiny.prepare --out runs/tiny
"""

from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerFast, Qwen3Config

from vllm_loopus.recast.output import complete_folder
from vllm_loopus.tiny.dataset import write_all
from vllm_loopus.tiny.tokenizer import build_tokenizer


def base_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 model of 0.2 million parameters in four layers."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=-(-len(tokenizer) // 32) * 32,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main(
    out: Annotated[Path, typer.Option(help="Folder to write; created only when complete.")],
    base_rows: Annotated[int, typer.Option(min=1, help="Rows of base.jsonl.")] = 300_000,
    post_rows: Annotated[int, typer.Option(min=1, help="Rows of post.jsonl.")] = 250_000,
    held_out: Annotated[int, typer.Option(min=1, help="Items of each task and difficulty.")] = 25,
    seed: int = 0,
) -> None:
    """Write `start` (config and tokenizer of the base model) and `data` (JSON lines)."""
    if out.exists():
        raise typer.BadParameter(f"--out {out} exists; choose another folder or delete it")
    with complete_folder(out) as folder:
        tokenizer = build_tokenizer()
        base_config(tokenizer).save_pretrained(folder / "start")
        tokenizer.save_pretrained(folder / "start")
        write_all(folder / "data", base_rows, post_rows, held_out, seed)


if __name__ == "__main__":
    typer.run(main)
