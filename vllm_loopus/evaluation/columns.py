"""The columns of the table, and presets of tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

# The metrics that a column can show. For a task without a preset, the first one it has is used.
PERPLEXITIES = ("word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte")
ACCURACIES = ("acc", "exact_match", "acc_norm", "f1", "pass@1")
NORMALISED = "acc_norm"


@dataclass(frozen=True)
class Column:
    """One metric of a task. `metric`: its name in lm-evaluation-harness, without the filter.

    `normalised`: whether the task also has the accuracy by length-normalised log-likelihood, which
    some tables show instead.
    """

    title: str
    task: str
    metric: str
    normalised: bool = False

    @property
    def is_perplexity(self) -> bool:
        return self.metric in PERPLEXITIES


@dataclass(frozen=True)
class Preset:
    """The tasks of a table. `max_length`: maximum tokens of a scored text; None: the model's.

    Tasks run with their few-shot setting in lm-evaluation-harness, which is zero for all of these.
    """

    columns: tuple[Column, ...]
    max_length: int | None = None


# The table of the paper. Task names, zero-shot and 1,024 tokens are from the released code
# (utils/lm_eval_harness.py, evaluate.py). The paper does not state the metric of the main table,
# but its values for the base models agree with `acc`. The TinyLlama table uses `acc_norm` (except
# for WinoGrande).
PAPER = Preset(
    (
        Column("Wiki", "wikitext", "word_perplexity"),
        Column("LAMBADA", "lambada_openai", "perplexity"),
        Column("MMLU", "mmlu", "acc"),
        Column("HS", "hellaswag", "acc", normalised=True),
        Column("ARC-E", "arc_easy", "acc", normalised=True),
        Column("ARC-C", "arc_challenge", "acc", normalised=True),
        Column("PIQA", "piqa", "acc", normalised=True),
        Column("WG", "winogrande", "acc"),
        Column("OBQA", "openbookqa", "acc", normalised=True),
    ),
    max_length=1024,
)
# The four task formats, on the tasks of loopus-tiny. The data is generated, nothing is downloaded.
TINY = Preset(
    (
        Column("Text", "tiny_text", "byte_perplexity"),
        Column("Last word", "tiny_last_word", "perplexity"),
        Column("Choice", "tiny_choice", "acc"),
        Column("Generation", "tiny_generate", "exact_match"),
    )
)
# Built from a file of texts that no training has seen (`--held-out FILE`).
HELD_OUT = Preset(
    (
        Column("Text", "held_out_text", "word_perplexity"),
        Column("Last word", "held_out_last_word", "acc"),
        Column("Ending", "held_out_choice", "acc", normalised=True),
        Column("Written", "held_out_word", "exact_match"),
    ),
    max_length=512,
)
PRESETS = {"paper": PAPER, "tiny": TINY, "held-out": HELD_OUT}


def expand(names: Sequence[str]) -> tuple[list[str], int | None]:
    """The task names with presets expanded, without duplicates, and the least `max_length`."""
    tasks: dict[str, None] = {}
    lengths = []
    for name in names:
        preset = PRESETS.get(name)
        tasks |= dict.fromkeys([c.task for c in preset.columns] if preset else [name])
        if preset and preset.max_length:
            lengths.append(preset.max_length)
    return list(tasks), min(lengths, default=None)


def column_of(task: str, metrics: Sequence[str], normalised: bool = False) -> Column | None:
    """The column of a task with these metrics; None if none of them can be shown.

    `normalised`: use the length-normalised accuracy if the column has it.
    """
    known = [column for preset in PRESETS.values() for column in preset.columns]
    for column in known:
        if column.task == task:
            if normalised and column.normalised:
                return Column(column.title, task, NORMALISED)
            return column
    for metric in (*ACCURACIES, *PERPLEXITIES):
        if metric in metrics:
            return Column(task, task, metric)
    return None
