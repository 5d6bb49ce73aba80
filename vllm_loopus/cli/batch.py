"""`vllm-loopus batch INPUT OUTPUT`: answers a file of requests with Ray Data LLM."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_loopus.cli.info import known_models, load_config, resolve
from vllm_loopus.cli.output import (
    INTERRUPTED,
    PROBLEM,
    JsonOption,
    absolute,
    json_object,
    print_json,
    report_errors,
)

DEFAULT_MODEL = "loopus-tiny"


def batch(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="JSON lines, one request per line.")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="JSON lines, one answer per line.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="An alias, a checkpoint folder, or owner/name on the hub. Default: the model "
            f"named in the rows, or {DEFAULT_MODEL}.",
            autocompletion=known_models,
        ),
    ] = None,
    engine_args: Annotated[
        str,
        typer.Option(help='vLLM engine arguments as JSON: {"max_model_len": 1024}.'),
    ] = "{}",
    replicas: Annotated[int, typer.Option(min=1, help="Number of engines.")] = 1,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Rows sent to an engine, and repeated after a failure, at once."),
    ] = 32,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS", help="A running Ray cluster. Default: a local one is started."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard the answers in OUTPUT.partial.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests on Ray, one answer per row, in order.

    After an interruption, the same command continues. Exit code 1 if rows failed; they are in
    OUTPUT with their error.
    """
    with redirect_stdout(sys.stderr), report_errors(ValueError, OSError):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm_loopus.batch.journal import JournalError
        from vllm_loopus.batch.run import Options, check_files, model_named

        check_files(source, output, force)
        model = model or model_named(source) or DEFAULT_MODEL
        load_config(model)
        options = Options(
            model=model,
            target=absolute(resolve(model)),
            engine_args=json_object("engine_args", engine_args),
            replicas=replicas,
            batch_size=batch_size,
            address=address,
        )
        from ray.exceptions import RayError

        resume = f"the same command continues from {output}.partial"
        try:
            done = _run(source, output, options, restart)
        except KeyboardInterrupt:
            typer.echo(f"\ninterrupted; {resume}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except JournalError as error:
            raise JournalError(f"{error}; free some space, then {resume}") from error
        except RayError as error:
            reason = str(error).strip().rpartition("\n")[2]
            logs = "the cause is in Ray's worker logs (/tmp/ray/session_latest/logs)"
            typer.echo(f"error: the engine failed: {reason}\n{logs}; {resume}", err=True)
            raise typer.Exit(PROBLEM) from error
    mean = round(done.depths / done.tokens, 4) if done.tokens else None
    facts = {
        "rows": done.rows, "failed": done.failed, "resumed": done.resumed,
        "tokens": done.tokens, "mean_exit_depth": mean, "output": str(output),
    }  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        typer.echo(
            f"{done.rows} rows in {output}: {done.rows - done.failed} answered, {done.failed} "
            f"failed, {done.resumed} from an earlier run; mean exit depth {mean}"
        )
    if done.failed:
        raise typer.Exit(PROBLEM)


def _run(source: Path, output: Path, options: Any, restart: bool) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from vllm_loopus.batch.run import run

    console = Console(file=sys.stderr)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("rows", total=None, status="")
        printed = [-1]

        def report(progress: Any) -> None:
            depth = f", depth {progress.depths / progress.tokens:.2f}" if progress.tokens else ""
            status = f"{progress.failed} failed{depth}"
            bar.update(task, total=progress.rows, completed=progress.done, status=status)
            tenth = 10 * progress.done // progress.rows
            if bar.disable and tenth > printed[0]:
                typer.echo(f"{progress.done}/{progress.rows} rows, {status}", err=True)
                printed[0] = tenth

        return run(source, output, options, report, restart)
