"""`vllm-loopus eval MODEL`: evaluates a looped model and its base model."""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_loopus.cli.info import ModelArgument, known_models
from vllm_loopus.cli.output import INTERRUPTED, JsonOption, print_json, print_table, report_errors

if TYPE_CHECKING:
    from vllm_loopus.evaluation.models import Model
    from vllm_loopus.evaluation.table import Table

NO_BASE = "none"
TINY_VOCABULARY = 128  # tokens of loopus-tiny


class Engine(StrEnum):
    """Engines: vLLM, or the reference model in transformers."""

    VLLM = "vllm"
    HF = "hf"


class KVPolicy(StrEnum):
    """K/V policies of the engine."""

    EXACT = "exact"
    LAST_EXITED = "last_exited"


class EvalDtype(StrEnum):
    """Dtypes to compute in; auto: the checkpoint's."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def evaluate(
    model: ModelArgument,
    base: Annotated[
        list[str] | None,
        typer.Option(
            help="Plain model to compare with, or none; can be repeated. Default: the model that "
            "MODEL was recast from.",
            autocompletion=known_models,
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-evaluation-harness, or the presets paper, tiny, held-out; commas."
        ),
    ] = "paper",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum documents of each task.")
    ] = None,
    max_loops: Annotated[
        int | None, typer.Option(help="Recursion budget. Default: the checkpoint's.")
    ] = None,
    early_exit: Annotated[
        bool | None,
        typer.Option("--early-exit/--no-early-exit", help="Evaluate only one. Default: both."),
    ] = None,
    exit_threshold: Annotated[
        float | None,
        typer.Option(help="Confidence above which tokens exit. Default: the checkpoint's."),
    ] = None,
    by_depth: Annotated[
        bool, typer.Option("--by-depth", help="A row for each fixed depth, not only the last.")
    ] = False,
    kv_policy: Annotated[
        KVPolicy, typer.Option(help="K/V of tokens that exited; not for hf.")
    ] = KVPolicy.EXACT,
    held_out: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Texts (JSON lines with `text`) for the tasks held-out.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("eval-results"),
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Reuse results that are in OUT already.")
    ] = True,
    published: Annotated[
        bool, typer.Option("--published", help="Also show the paper's results.")
    ] = False,
    engine: Annotated[
        Engine, typer.Option(help="vllm, or hf for the slow reference model.")
    ] = Engine.VLLM,
    dtype: Annotated[EvalDtype, typer.Option(help="Dtype of the models.")] = EvalDtype.AUTO,
    max_length: Annotated[
        int | None,
        typer.Option(min=8, help="Maximum tokens of a text. Default: 1024 for paper, else none."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the engine hf.")] = 16,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Few-shot examples. Default: that of each task.")
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder with your task definitions."),
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown instead of a table.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run lm-evaluation-harness on a looped model and its base, and print the paper's table.

    Results are stored in OUT. After an interruption, the same command continues.
    """
    with report_errors(ValueError, OSError):
        if as_markdown and as_json:
            raise ValueError("--markdown and --json exclude each other; give one")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        _use_held_out(names, held_out)
        approximate = kv_policy is not KVPolicy.EXACT
        if approximate and engine is Engine.HF:
            raise ValueError(f"kv_policy={kv_policy.value} needs --engine vllm; leave it out")
        _set_environment()
    # Messages of lm-eval and vLLM go to standard error.
    with redirect_stdout(sys.stderr), report_errors(ValueError, OSError):
        from vllm_loopus.evaluation import published as paper
        from vllm_loopus.evaluation.engines import EngineOptions
        from vllm_loopus.evaluation.models import looped_model
        from vllm_loopus.evaluation.run import make_plan, measure, quiet
        from vllm_loopus.evaluation.store import Store
        from vllm_loopus.evaluation.table import Table, columns_of

        quiet()
        looped = looped_model(
            model, max_loops, early_exit, exit_threshold, by_depth,
            kv_policy.value if approximate else None,
        )  # fmt: skip
        models = _models(model, looped, base)
        _warn_of_tiny(names, model, looped.config.vocab_size)
        row = None
        if published:
            row = paper.published_row(models[-1].config.base_model_name_or_path)
        options = EngineOptions(engine.value, dtype.value, max_length, batch_size, kv_policy.value)
        plan = make_plan(models, names, options, limit, num_fewshot, include)
        columns_of(plan)
        store = Store(out)
        store.check()
    try:
        with redirect_stdout(sys.stderr), report_errors(OSError):
            results = measure(plan, store, resume=resume, log=_log)
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; the same command continues from {out}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    table = Table.of(plan, results, row)
    about = _about(plan, results)
    if as_json:
        print_json({**table.to_dict(), "about": about})
    elif as_markdown:
        _print_markdown(table, about)
    else:
        _print_wide(*table.cells())
        if table.difficulties:
            _print_wide(*table.cells_by_difficulty())
        typer.echo(about)


def _use_held_out(names: list[str], held_out: Path | None) -> None:
    """Tells the held-out tasks their file. Raises `ValueError` if they have none."""
    if held_out is not None:
        os.environ["VLLM_LOOPUS_HELD_OUT"] = str(held_out)
    elif any(name.replace("-", "_").startswith("held_out") for name in names):
        raise ValueError(
            "tasks=held-out needs texts that no training has seen; give --held-out FILE, JSON "
            "lines with `text`"
        )


def _warn_of_tiny(names: list[str], model: str, vocabulary: int) -> None:
    tiny = [name for name in names if name == "tiny" or name.startswith("tiny_")]
    if tiny and vocabulary != TINY_VOCABULARY:
        typer.echo(
            f"note: the tasks {', '.join(tiny)} are the ones that loopus-tiny was trained for; "
            f"they mean little for {model}. For a language model: --tasks held-out",
            err=True,
        )


def _models(name: str, looped: "Model", base: list[str] | None) -> "list[Model]":
    """Bases first, the looped model last. Raises `ValueError`."""
    from vllm_loopus.evaluation.models import plain_model

    bases = list(dict.fromkeys(base or [looped.config.base_model_name_or_path]))
    if bases == [NO_BASE]:
        return [looped]
    if NO_BASE in bases:
        raise ValueError(f"base={', '.join(bases)}: none excludes the others; remove it")
    if bases == [None]:
        if looped.config.get_text_config() is looped.config:  # made from no other model
            return [looped]
        raise ValueError(f"{name} does not name its base; give --base MODEL, or --base {NO_BASE}")
    try:
        return [*map(plain_model, bases), looped]
    except ValueError as error:
        if base:
            raise
        raise ValueError(
            f"{error}. Another base: --base MODEL; without: --base {NO_BASE}"
        ) from error


def _set_environment() -> None:
    """Sets defaults for vLLM's logging, before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def _log(line: str) -> None:
    typer.echo(line, err=True)


def _about(plan: Any, results: Any) -> str:
    """The line below the table: date, versions and machine."""
    versions = results[0].identity
    documents = (
        "all documents" if plan.limit is None else f"at most {plan.limit} documents per task"
    )
    date = max(result.about["date"] for result in results)[:10]
    machines = ", then ".join(dict.fromkeys(result.about["machine"] for result in results))
    software = f"vLLM {versions['vllm']}" if "vllm" in versions else "transformers"
    return (
        f"{date}, {software}, lm-eval {versions['lm_eval']}, dtype {plan.options.dtype}, "
        f"{documents}, {machines}. ± is the standard error."
    )


def _print_wide(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints the table with standard errors below their values."""
    print_table(heads, [[cell.replace(" ± ", "\n± ") for cell in row] for row in rows])


def _print_markdown(table: "Table", about: str) -> None:
    from vllm_loopus.evaluation.table import markdown

    parts = [markdown(*table.cells())]
    if table.difficulties:
        parts += [
            "Accuracy by difficulty k, the number of steps a question takes:",
            markdown(*table.cells_by_difficulty()),
        ]
    typer.echo("\n\n".join([*parts, about]))
