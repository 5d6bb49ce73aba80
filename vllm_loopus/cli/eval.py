"""`vllm-loopus eval MODEL`: how good a looped model is, beside its base."""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_loopus.cli.info import ModelArgument, known_models
from vllm_loopus.cli.output import INTERRUPTED, JsonOption, errors_told, print_json, print_table

if TYPE_CHECKING:
    from vllm_loopus.evaluation.models import Model
    from vllm_loopus.evaluation.table import Table

NO_BASE = "none"


class Engine(StrEnum):
    """What computes: our vLLM engine, or the reference model in transformers."""

    VLLM = "vllm"
    HF = "hf"


class EvalDtype(StrEnum):
    """What to compute in; auto: the checkpoint's dtype."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def evaluate(
    model: ModelArgument,
    base: Annotated[
        list[str] | None,
        typer.Option(
            help="Plain model to compare with, or none; again for more. Default: the one the model "
            "was recast from.",
            autocompletion=known_models,
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(help="Names of lm-evaluation-harness, with commas; paper and tiny are sets."),
    ] = "paper",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    max_loops: Annotated[int | None, typer.Option(help="Default: the checkpoint's.")] = None,
    early_exit: Annotated[
        bool | None,
        typer.Option("--early-exit/--no-early-exit", help="One of the two. Default: both."),
    ] = None,
    exit_threshold: Annotated[
        float | None, typer.Option(help="Confidence to leave at. Default: the checkpoint's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("eval-results"),
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Take results that are in OUT already.")
    ] = True,
    published: Annotated[
        bool, typer.Option("--published", help="The paper's rows beside ours.")
    ] = False,
    engine: Annotated[Engine, typer.Option(help="hf: the reference, slow.")] = Engine.VLLM,
    dtype: Annotated[EvalDtype, typer.Option(help="What to compute in.")] = EvalDtype.AUTO,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a text. Default: paper 1024, else all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the engine hf.")] = 16,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples. Default: each task's own.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Task definitions of yours.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown instead of a table.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run lm-evaluation-harness on a looped model and its base, and print the paper's table.

    Each result is kept in OUT: stopped, the same command goes on where it was.
    """
    with errors_told(ValueError, OSError):
        if as_markdown and as_json:
            raise ValueError("--markdown and --json exclude each other")
        _set_environment()
    # What lm-eval and vLLM print is no part of the answer.
    with redirect_stdout(sys.stderr), errors_told(ValueError, OSError):
        from vllm_loopus.evaluation import published as paper
        from vllm_loopus.evaluation.engines import EngineOptions
        from vllm_loopus.evaluation.run import make_plan, measure, quiet
        from vllm_loopus.evaluation.store import Store
        from vllm_loopus.evaluation.table import Table, columns_of

        quiet()
        models = _models(model, base, max_loops, early_exit, exit_threshold)
        row = None
        if published:
            row = paper.published_row(models[-1].config.base_model_name_or_path)
        options = EngineOptions(engine.value, dtype.value, max_length, batch_size)
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        plan = make_plan(models, names, options, limit, num_fewshot, include)
        columns_of(plan)
        store = Store(out)
        store.check()
    try:
        with redirect_stdout(sys.stderr), errors_told(OSError):
            results = measure(plan, store, resume=resume, tell=_tell)
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; the same command goes on with what is in {out}", err=True)
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


def _models(
    name: str,
    base: list[str] | None,
    max_loops: int | None,
    early_exit: bool | None,
    exit_threshold: float | None,
) -> "list[Model]":
    """Bases first, the looped model last. Raises `ValueError`."""
    from vllm_loopus.evaluation.models import looped_model, plain_model

    looped = looped_model(name, max_loops, early_exit, exit_threshold)
    bases = list(dict.fromkeys(base or [looped.config.base_model_name_or_path]))
    if bases == [NO_BASE]:
        return [looped]
    if NO_BASE in bases:
        raise ValueError(f"base={', '.join(bases)}: none excludes the others")
    if bases == [None]:
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
    """Before vLLM is imported, here and in its processes."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _about(plan: Any, results: Any) -> str:
    """What else a reader of the table has to know."""
    versions = results[0].identity
    documents = "all documents" if plan.limit is None else f"{plan.limit} documents a task at most"
    date = max(result.about["date"] for result in results)[:10]
    machines = ", then ".join(dict.fromkeys(result.about["machine"] for result in results))
    software = f"vLLM {versions['vllm']}" if "vllm" in versions else "transformers"
    return (
        f"{date}, {software}, lm-eval {versions['lm_eval']}, dtype {plan.options.dtype}, "
        f"{documents}, {machines}. ± is the standard error."
    )


def _print_wide(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Standard errors below their numbers."""
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
