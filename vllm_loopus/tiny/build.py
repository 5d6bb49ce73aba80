"""Build the embedded `loopus-tiny` checkpoint: cut the trained base and write its model card.

python -m vllm_loopus.tiny.build --base stage-2 --out loopus-tiny
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.recast.convert import recast
from vllm_loopus.tiny.pretrain import accuracy
from vllm_loopus.tiny.tasks import MAX_DIFFICULTY, TASKS, evaluation_set

ENCODER_LAYERS, DECODER_LAYERS = 1, 1
MAX_LOOPS = 2  # without post-training, more loops carry the state away from the answer
MEASURED_LOOPS = (1, 2, 4, 8)
ITEMS_PER_DIFFICULTY = 50

CARD = """---
library_name: vllm-loopus
tags: [loopus, looped-transformer, synthetic]
---
# loopus-tiny

A character-level Qwen3-style model of {parameters:,} parameters, embedded in vllm-loopus for tests
and demonstrations. Its base was trained from nothing on k-hop lookups and nested arithmetic
(`vllm_loopus/tiny/tasks.py`), then cut into encoder {encoder}, reasoning block {reasoning} and
decoder {decoder} and looped {loops} times, with gate and confidence head at their initialisation.

**It is recast, not post-trained**: more loops do not help yet, many hurt. Share of right answers by
the number of steps k ({items} items each), greedy:

| model | task | {heads} |
|---|---|{rule}
{rows}

The commands that made it stand in `vllm_loopus/tiny/pretrain.py` and `vllm_loopus/tiny/build.py`.
"""


def scores_by_loops(model: LoopUSForCausalLM, folder: Path) -> dict[tuple[int, str, int], float]:
    """Accuracy by (loops, task, difficulty), every token at that depth."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    items = evaluation_set(seed=0, per_difficulty=ITEMS_PER_DIFFICULTY)
    scores = {}
    for n in tqdm(MEASURED_LOOPS, desc="evaluate"):
        model.config.update({"max_loops": n, "exit_threshold": 1.0})
        found = accuracy(model, tokenizer, items)
        scores.update({(n, task, k): share for (task, k), share in found.items()})
    return scores


def main(
    base: Annotated[Path, typer.Option(help="The trained base, a folder.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    seed: int = 0,
) -> None:
    """Cut the base of loopus-tiny, loop it, and measure it."""
    config = recast(
        str(base),
        out,
        encoder=ENCODER_LAYERS,
        decoder=DECODER_LAYERS,
        seed=seed,
        max_loops=MAX_LOOPS,
        base_model_name_or_path="loopus-tiny-base",
    )
    model = LoopUSForCausalLM.from_pretrained(out, dtype=torch.float32)
    scores = scores_by_loops(model, out)
    levels = range(1, MAX_DIFFICULTY + 1)
    table = Table("loops", "task", *(f"k={k}" for k in levels))
    lines = []
    for n in MEASURED_LOOPS:
        for task in TASKS:
            cells = [f"{scores[n, task, k]:.0%}" for k in levels]
            table.add_row(str(n), task, *cells)
            lines.append(f"| {n} loops | {task} | {' | '.join(cells)} |")
    Console().print(table)
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        encoder=config.encoder_layer_indices,
        reasoning=config.reasoning_layer_indices,
        decoder=config.decoder_layer_indices,
        loops=MAX_LOOPS,
        items=ITEMS_PER_DIFFICULTY,
        heads=" | ".join(f"k={k}" for k in levels),
        rule="---|" * MAX_DIFFICULTY,
        rows="\n".join(lines),
    )
    (out / "README.md").write_text(card)


if __name__ == "__main__":
    typer.run(main)
