"""Copies trained models to the embedded checkpoints of the package, with model cards.

python -m vllm_loopus.tiny.publish --runs runs/tiny
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM

from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.recast.output import complete_folder

LOOPED, BASE = "loopus-tiny", "loopus-tiny-base"
CARD = """---
library_name: {library}
tags: [{tags}]
---
# {name}

{about}

It solves two synthetic tasks whose items need a known number of steps k
(`vllm_loopus/tiny/tasks.py`): where a ball is after k swaps of cups (`b:ab,cd=`, answer `a`), and
a one-digit pocket calculator (`3+2*3=`, answer `5`). Percentage of right answers on {items:,}
held-out items, greedy, float32; ± is one standard error; perplexity is that of the right answer:

{table}

Made by `examples/train_tiny.sh` on two CPU cores; `provenance.json` has settings, data and hashes.
The control is the base, trained further as a plain model on the tokens that the looped model was
post-trained on.
"""
ABOUT = {
    LOOPED: (
        "A character-level model of {parameters:,} parameters, embedded in vllm-loopus for tests "
        "and demonstrations. `loopus-tiny-base`, recast into encoder (layer 0), reasoning block "
        "(layers 1 and 2) and decoder (layer 3), and post-trained by random deep supervision."
    ),
    BASE: (
        "The plain Qwen3 model that `loopus-tiny` was recast from: 4 layers, {parameters:,} "
        "parameters, character level, trained from scratch."
    ),
}


def publish(source: Path, name: str, result: dict[str, object], table: str, out: Path) -> None:
    """Copies the trained model `source` to the folder `out`, with the model card for `name`."""
    looped = name == LOOPED
    parameters = AutoModelForCausalLM.from_pretrained(source).num_parameters()
    card = CARD.format(
        name=name,
        library="vllm-loopus" if looped else "transformers",
        tags="loopus, looped-transformer, synthetic" if looped else "qwen3, synthetic",
        about=ABOUT[name].format(parameters=parameters),
        items=result["items"],
        table=table,
    )
    with complete_folder(out) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        if looped:
            config = LoopUSConfig.from_pretrained(source)
            config.base_model_name_or_path = BASE
            config.save_pretrained(folder)
        (folder / "README.md").write_text(card)


def main(
    runs: Annotated[Path, typer.Option(help="Outputs of the training runs.")] = Path("runs/tiny"),
) -> None:
    """Replace the embedded checkpoints with the trained ones."""
    report = runs / "report"
    result = json.loads((report / "results.json").read_text())
    table = (report / "table.md").read_text()
    for name, run in ((LOOPED, "looped"), (BASE, "base")):
        publish(runs / run / "model", name, result, table, EMBEDDED[name])
        typer.echo(f"{name}: {EMBEDDED[name]}")


if __name__ == "__main__":
    typer.run(main)
