"""Compares base, control and looped model of `loopus-tiny`: a table, JSON and pictures.

python -m vllm_loopus.tiny.evaluate --runs runs/tiny --out runs/tiny/report
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.recast.output import complete_folder
from vllm_loopus.tiny.scores import Scores, score
from vllm_loopus.tiny.tasks import MAX_DIFFICULTY, TASKS, Item, evaluation_set

SEED = 0  # of the items of the report; training evaluates others
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
LEVELS = range(1, MAX_DIFFICULTY + 1)


def standard_error(share: float, count: int) -> float:
    """The standard error of a share of `count` items."""
    return (share * (1 - share) / count) ** 0.5


def load(folder: Path | str) -> tuple[Any, Any]:
    """Loads a model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def accuracies(right: torch.Tensor, scores: Scores) -> dict[str, Any]:
    """The share of right answers [M] with its standard error, and by task and difficulty."""
    share = right.mean().item()
    return {
        "accuracy": share,
        "standard_error": standard_error(share, len(right)),
        "by_difficulty": {
            task: [right[scores.of(task, k)].mean().item() for k in LEVELS] for task in TASKS
        },
    }


def plain_result(folder: Path | str, items: list[Item]) -> dict[str, Any]:
    """The accuracies of a plain model on `items`, and the perplexity of the right answers."""
    scores = score(*load(folder), items)
    return {
        **accuracies(scores.right[0], scores),
        "perplexity": scores.losses[0].mean().exp().item(),
    }


def looped_result(folder: Path | str, items: list[Item]) -> dict[str, Any]:
    """The results of a LoopUS model on `items` at every depth, and with early exit by threshold."""
    model, tokenizer = load(folder)
    assert isinstance(model, LoopUSForCausalLM)
    scores = score(model, tokenizer, items)
    default = model.config.exit_threshold
    exits = {}
    for threshold in sorted({*THRESHOLDS, default}):
        model.config.exit_threshold = threshold
        depths = scores.exit_depths(HaltingRule.from_config(model.config))
        right, losses = scores.at(depths)
        exits[str(threshold)] = {
            **accuracies(right, scores),
            "perplexity": losses.mean().exp().item(),
            "mean_exit_depth": depths.float().mean().item(),
            "exit_depths": {
                task: [
                    torch.bincount(depths[scores.of(task, k)], minlength=len(scores.right) + 1)[
                        1:
                    ].tolist()
                    for k in LEVELS
                ]
                for task in TASKS
            },
        }
    return {
        "max_loops": len(scores.right),
        "by_depth": [
            {**accuracies(right, scores), "perplexity": losses.mean().exp().item()}
            for right, losses in zip(scores.right, scores.losses, strict=True)
        ],
        "default_threshold": default,
        "early_exit": exits,
    }


def evaluate(
    looped: Path | str,
    plain: Mapping[str, Path | str],
    per_difficulty: int,
    seed: int = SEED,
) -> dict[str, Any]:
    """The results of all models on the same held-out items, as JSON."""
    items = evaluation_set(seed, per_difficulty)
    return {
        "items": len(items),
        "seed": seed,
        "plain": {name: plain_result(folder, items) for name, folder in plain.items()},
        "looped": looped_result(looped, items),
    }


def markdown(result: dict[str, Any]) -> str:
    """The Markdown table of a result: accuracy by difficulty over both tasks."""
    looped = result["looped"]
    threshold = str(looped["default_threshold"])
    exit_ = looped["early_exit"][threshold]
    lines = [
        "| model | passes | " + " | ".join(f"k={k}" for k in LEVELS) + " | all | ± | perplexity |",
        "|---|---|" + "---|" * (MAX_DIFFICULTY + 3),
    ]

    def line(name: str, passes: str, numbers: dict[str, Any]) -> None:
        by_level = zip(*numbers["by_difficulty"].values(), strict=True)
        cells = [f"{100 * sum(level) / len(level):.0f}" for level in by_level]
        ends = (100 * numbers["accuracy"], 100 * numbers["standard_error"])
        cells += [*(f"{end:.1f}" for end in ends), f"{numbers['perplexity']:.3f}"]
        lines.append(f"| {name} | {passes} | {' | '.join(cells)} |")

    for name, numbers in result["plain"].items():
        line(name, "-", numbers)
    for depth, numbers in enumerate(looped["by_depth"], start=1):
        line("looped", str(depth), numbers)
    line(f"looped, early exit at {threshold}", f"{exit_['mean_exit_depth']:.2f}", exit_)
    return "\n".join(lines)


def main(
    looped: Annotated[str, typer.Option(help="The post-trained model.")] = "runs/tiny/looped/model",
    plain: Annotated[
        list[str] | None, typer.Option(help="Plain models to compare with: NAME=FOLDER.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results and pictures.")] = None,
    training: Annotated[
        Path | None, typer.Option(help="Output of the training run, for its curves.")
    ] = None,
    per_difficulty: Annotated[
        int, typer.Option(min=1, help="Items of each task and difficulty.")
    ] = 200,
) -> None:
    """Print the table, and write results.json, table.md and pictures to OUT."""
    models: dict[str, Path | str] = {}
    for entry in plain or ():
        name, separator, folder = entry.partition("=")
        if not separator:
            raise typer.BadParameter(f"--plain {entry!r} must be NAME=FOLDER")
        models[name] = folder
    result = evaluate(looped, models, per_difficulty)
    table = markdown(result)
    if out is not None:
        from vllm_loopus.tiny.pictures import draw_all

        with complete_folder(out) as report:
            (report / "results.json").write_text(json.dumps(result, indent=1) + "\n")
            (report / "table.md").write_text(table + "\n")
            draw_all(result, training, report)
    Console(width=200).print(table, markup=False)


if __name__ == "__main__":
    typer.run(main)
