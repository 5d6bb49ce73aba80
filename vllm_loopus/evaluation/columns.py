"""Columns of the table, and the sets of tasks that have a name."""

from collections.abc import Sequence
from dataclasses import dataclass

# In the order in which the column of a task without a preset looks for its metric.
PERPLEXITIES = ("word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte")
ACCURACIES = ("acc", "exact_match", "acc_norm", "f1", "pass@1")
NORMALISED = "acc_norm"


@dataclass(frozen=True)
class Column:
    """One number of a task: `metric` is lm-evaluation-harness's name without the filter.

    `normalised`: lm-eval also gives the accuracy by length-normalised log-likelihood, which some
    tables show instead.
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
    """Tasks that make one table. `max_length`: tokens of a scored text at most, None: the model's.

    Every task runs with its own few-shot setting in lm-evaluation-harness, for all of these none.
    """

    columns: tuple[Column, ...]
    max_length: int | None = None


# What the paper shows. From the released code (utils/lm_eval_harness.py, evaluate.py): the names of
# the tasks, no few-shot examples, 1,024 tokens. The main table's metric is not stated; its base
# rows are of the size of `acc`. The TinyLlama table says `acc_norm` (but for WinoGrande).
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
# The four formats of tasks, on what loopus-tiny learns; data is made here, nothing is fetched.
TINY = Preset(
    (
        Column("Text", "tiny_text", "byte_perplexity"),
        Column("Last word", "tiny_last_word", "perplexity"),
        Column("Choice", "tiny_choice", "acc"),
        Column("Generation", "tiny_generate", "exact_match"),
    )
)
PRESETS = {"paper": PAPER, "tiny": TINY}


def expand(names: Sequence[str]) -> tuple[list[str], int | None]:
    """Task names with presets written out, each once, and the presets' least `max_length`."""
    tasks: dict[str, None] = {}
    lengths = []
    for name in names:
        preset = PRESETS.get(name)
        tasks |= dict.fromkeys([c.task for c in preset.columns] if preset else [name])
        if preset and preset.max_length:
            lengths.append(preset.max_length)
    return list(tasks), min(lengths, default=None)


def column_of(task: str, metrics: Sequence[str], normalised: bool = False) -> Column | None:
    """The column of a task with these metrics; None when none of them is known.

    `normalised`: by length-normalised accuracy where the column has it.
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
