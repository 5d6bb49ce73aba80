"""Train the base model of `loopus-tiny` from nothing, on a CPU, in minutes.

The embedded checkpoint was made in two stages, arithmetic first:

    python -m vllm_loopus.tiny.pretrain --out stage-1 --lookup-question-weight 0.1
    python -m vllm_loopus.tiny.pretrain --out stage-2 --start stage-1 --steps 750 \
        --learning-rate 1e-3 --seed 7
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
)

from vllm_loopus.tiny.tasks import MAX_DIFFICULTY, TASKS, Item, conversations, evaluation_set
from vllm_loopus.tiny.tokenizer import build_tokenizer

# Weight of the questions' characters in the loss; answers weigh 1. The digits of an expression
# cannot be foreseen, but the second copy of a map can: it teaches to look arrows up.
QUESTION_WEIGHT = {"lookup": 1.0, "arithmetic": 0.1}
# Questions in one training sequence; expressions are longer than lookups.
TURNS = {"lookup": 5, "arithmetic": 3}
CURRICULUM_SHARE = 0.6  # of the steps, until every difficulty has come in


def base_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 model of about 0.8 million parameters."""
    return Qwen3Config(
        vocab_size=-(-len(tokenizer) // 32) * 32,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def render(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerFast, chat: bool
) -> tuple[list[int], list[float]]:
    """Token ids of questions and answers in turn, and the weight of each in the loss.

    Every answer is closed by the end token.
    """
    ids: list[int] = []
    weights: list[float] = []
    for item in items:
        text = item.question
        if chat:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        question = tokenizer.encode(text)
        answer = [*tokenizer.encode(item.answer), tokenizer.eos_token_id]
        ids += question + answer
        weights += [QUESTION_WEIGHT[item.task]] * len(question) + [1.0] * len(answer)
    return ids, weights


def batches(
    seed: int, size: int, steps: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`steps` pairs of ids and weights [size, T]: one task each, half in chat form, easy first."""
    sources = [
        {task: conversations(seed + 1000 * d, task, turns, d) for task, turns in TURNS.items()}
        for d in range(1, MAX_DIFFICULTY + 1)
    ]
    for step in range(steps):
        reached = min(1.0, step / (CURRICULUM_SHARE * steps)) * (MAX_DIFFICULTY - 1)
        source = sources[int(reached)][TASKS[step % len(TASKS)]]
        rows = [
            render(items, tokenizer, chat=index % 2 == 0)
            for index, items in enumerate(islice(source, size))
        ]
        yield (
            pad_sequence(
                [torch.tensor(ids) for ids, _ in rows],
                batch_first=True,
                padding_value=tokenizer.pad_token_id,
            ),
            pad_sequence([torch.tensor(weights) for _, weights in rows], batch_first=True),
        )


def weighted_loss(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of logits [B, T, V], averaged with the weights [B, T] of ids."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]
) -> dict[tuple[str, int], float]:
    """Share of items whose first predicted character is the answer, by task and difficulty."""
    right: Counter[tuple[str, int]] = Counter()
    asked: Counter[tuple[str, int]] = Counter()
    for item in items:
        ids = torch.tensor([tokenizer.encode(item.question)])
        predicted = tokenizer.decode(model(ids).logits[0, -1].argmax())
        right[item.task, item.difficulty] += predicted == item.answer
        asked[item.task, item.difficulty] += 1
    return {key: right[key] / asked[key] for key in sorted(asked)}


def print_accuracy(scores: dict[tuple[str, int], float], title: str) -> None:
    table = Table("task", *(f"k={k}" for k in range(1, MAX_DIFFICULTY + 1)), title=title)
    for task in sorted({task for task, _ in scores}):
        row = (f"{scores[task, k]:.0%}" for k in range(1, MAX_DIFFICULTY + 1))
        table.add_row(task, *row)
    Console().print(table)


def pretrain(
    out: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    start: Path | None = None,
    per_difficulty: int = 100,
) -> None:
    """Train, write the checkpoint folder `out`, and print accuracies.

    Training goes on from the checkpoint `start` where given. `out` appears when it is complete;
    `per_difficulty` items of each task and difficulty are asked.
    Raises `FileExistsError` when `out` is there already.
    """
    if out.exists():
        raise FileExistsError(f"out={out} exists; choose another folder or delete it")
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    if start is None:
        model = Qwen3ForCausalLM(base_config(tokenizer))
    else:
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    losses: dict[str, str] = {}
    progress = tqdm(batches(seed, batch_size, steps, tokenizer), total=steps, desc="pretrain")
    for step, (ids, weights) in enumerate(progress):
        loss = weighted_loss(model(ids).logits, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 < len(TASKS):
            losses[TASKS[step % len(TASKS)]] = f"{loss.item():.3f}"
            progress.set_postfix(losses)

    model.eval().to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
        folder = Path(unfinished) / out.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.move(folder, out)
    items = evaluation_set(seed=0, per_difficulty=per_difficulty)
    print_accuracy(accuracy(model.float(), tokenizer, items), "base model")


def main(
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-3,
    seed: int = 0,
    start: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
    lookup_question_weight: Annotated[float, typer.Option(min=0.0)] = QUESTION_WEIGHT["lookup"],
) -> None:
    """Train the base model of loopus-tiny."""
    QUESTION_WEIGHT["lookup"] = lookup_question_weight
    pretrain(out, steps, batch_size, learning_rate, seed, start)


if __name__ == "__main__":
    typer.run(main)
