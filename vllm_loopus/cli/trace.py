"""`vllm-loopus trace`: predictions at each depth, exit depths and their reasons."""

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_loopus.architectures import record_of
from vllm_loopus.cli.info import ModelArgument, load_config, resolve
from vllm_loopus.cli.output import PROBLEM, check_picture, check_writable, print_json, report_errors
from vllm_loopus.cli.progress import Progress
from vllm_loopus.files import write_text

if TYPE_CHECKING:
    from vllm_loopus.architectures import LoopedConfig
    from vllm_loopus.trace.questions import Question
    from vllm_loopus.trace.tokens import Vocabulary
    from vllm_loopus.trace.tracing import Answer, Traced

STDOUT = Path("-")


class Engine(StrEnum):
    """Engines that generate answers."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


class Dtype(StrEnum):
    """Dtypes to compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


DEFAULT = "Default: the checkpoint's."


def trace(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option(help="The prompt to answer.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts: one per line, or JSON lines with `prompt`."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to prompts.")
    ] = False,
    answer: Annotated[
        str | None, typer.Option(help="Trace this answer to --prompt instead of generating one.")
    ] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Trace the `answer` of each line of --prompts.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens to generate.")] = 32,
    max_loops: Annotated[int | None, typer.Option(help=f"Recursion budget. {DEFAULT}")] = None,
    min_loops: Annotated[int | None, typer.Option(help=f"Minimum exit depth. {DEFAULT}")] = None,
    exit_threshold: Annotated[
        float | None, typer.Option(help=f"Confidence above which tokens exit. {DEFAULT}")
    ] = None,
    halting_strategy: Annotated[
        str | None, typer.Option(help=f"Halting strategy. {DEFAULT}")
    ] = None,
    exit_interval: Annotated[
        int | None, typer.Option(help=f"Loops between checks of the exit rule. {DEFAULT}")
    ] = None,
    convergence_epsilon: Annotated[
        float | None, typer.Option(help=f"Step length below which tokens exit. {DEFAULT}")
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(help="Engine that generates. Values are always computed by transformers."),
    ] = Engine.TRANSFORMERS,
    check: Annotated[
        bool,
        typer.Option("--check", help="Run both engines and compare; exit code 1 if they differ."),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Most probable tokens to store per depth.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the trace as JSON; - for standard output.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the trace as an HTML page.")] = None,
    trajectories: Annotated[
        Path | None,
        typer.Option(help="Draw the state trajectories of the first prompt (PNG, SVG, PDF)."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of the trajectories: 0,2,5..8. Default: evenly spaced."),
    ] = None,
    convergence: Annotated[
        Path | None, typer.Option(help="Draw the convergence over all prompts (PNG, SVG, PDF).")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if the model has none.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of both engines.")] = Dtype.FLOAT32,
    device: Annotated[str, typer.Option(help="Device of transformers: cpu, cuda.")] = "cpu",
) -> None:
    """Show the predictions at each depth for every token, its exit depth and the reason."""
    with report_errors(ValueError, OSError):
        _check_options(prompt, prompts, answer, answers, tokens, engine, check)
        if html == STDOUT:
            raise ValueError("--html needs a file; only --json can write to standard output")
        for file in (json_file, html):
            if file is not None and file != STDOUT:
                check_writable(file)
        for picture in (trajectories, convergence):
            if picture is not None:
                check_picture(picture)
        config = load_config(model)

        from transformers.utils.logging import disable_progress_bar

        from vllm_loopus.trace import reference, tracing
        from vllm_loopus.trace.questions import check_lengths, from_file, from_text

        tracing.set_knobs(
            config,
            max_loops=max_loops,
            min_loops=min_loops,
            exit_threshold=exit_threshold,
            halting_strategy=halting_strategy,
            exit_interval=exit_interval,
            convergence_epsilon=convergence_epsilon,
        )
        source = resolve(model)
        own = None if tokenizer is None else resolve(tokenizer)
        vocabulary = reference.load_vocabulary(source, config, own)
        if prompt is not None:
            questions = [from_text(vocabulary, prompt, answer, chat)]
        else:
            assert prompts is not None
            questions = from_file(vocabulary, prompts, chat, answers)
        check_lengths(questions, max_tokens, tracing.context_of(config))
        disable_progress_bar()
        reasoner = reference.load_model(source, config, dtype.value, device)
        stops = reference.stop_tokens(reasoner, vocabulary)
        by_vllm = _ask_vllm(
            engine is Engine.VLLM or check, source, config, questions, vocabulary, dtype.value,
            max_tokens, stops,
        )  # fmt: skip
        generated = (
            by_vllm
            if engine is Engine.VLLM
            else tracing.answers_of_transformers(
                reasoner, questions, max_tokens, stops, Progress("answer")
            )
        )
        found = []
        progress = Progress("values by depth")
        for question, one in zip(questions, generated, strict=True):
            found.append(
                _with_trajectories(tracing.traced(reasoner, vocabulary, question, one, top), tokens)
            )
            progress(f"{len(found)} of {len(questions)} prompts")
    document = _document(model, engine, dtype, config, found)
    _write(document, json_file, html, trajectories, convergence)
    if json_file != STDOUT:
        from vllm_loopus.cli.trace_tables import print_tables

        print_tables(document)
    compare_vllm = check and engine is not Engine.VLLM
    _report_differences(
        found,
        by_vllm if compare_vllm else [one.reference_answer for one in found],
        f"Both sides agree in tokens and exit depths of {len(found)} answers." if by_vllm else "",
        dtype is Dtype.FLOAT32,
    )


def _check_options(
    prompt: str | None,
    prompts: Path | None,
    answer: str | None,
    answers: bool,
    tokens: str | None,
    engine: Engine,
    check: bool,
) -> None:
    if (prompt is None) == (prompts is None):
        raise ValueError("give one of --prompt TEXT and --prompts FILE")
    if answer is not None and prompt is None:
        raise ValueError("--answer needs --prompt; with --prompts, give --answers")
    if answers and prompts is None:
        raise ValueError("--answers needs --prompts; with --prompt, give --answer TEXT")
    if tokens is not None and prompt is None:
        raise ValueError("--tokens needs --prompt, because the answers to a file differ in length")
    if (answer is not None or answers) and (engine is Engine.VLLM or check):
        raise ValueError("a given answer is not generated; omit --engine vllm and --check")


def _ask_vllm(
    wanted: bool,
    source: str,
    config: "LoopedConfig",
    questions: "Sequence[Question]",
    vocabulary: "Vocabulary",
    dtype: str,
    max_tokens: int,
    stops: Sequence[int],
) -> "list[Answer]":
    if not wanted:
        return []
    from vllm_loopus.trace import engine, tracing

    longest = max(len(question.prompt_ids) for question in questions) + max_tokens
    llm = engine.start(source, config, dtype=dtype, max_model_len=longest)
    try:
        return tracing.answers_of_vllm(llm, questions, config, max_tokens, stops)
    finally:
        engine.shut_down(llm)


def _with_trajectories(traced: "Traced", tokens: str | None) -> "Traced":
    """Adds trajectories to a trace, and removes the states, which are large."""
    from vllm_loopus.trace.trajectories import chosen_tokens, trajectories

    chosen = None if tokens is None else chosen_tokens(tokens, len(traced.trace.tokens))
    return replace(
        traced,
        trace=replace(traced.trace, trajectories=trajectories(traced.values, chosen)),
        values=replace(traced.values, states=traced.values.states[:, :0]),
    )


def _document(
    model: str, engine: Engine, dtype: Dtype, config: "LoopedConfig", found: "Sequence[Traced]"
) -> dict[str, Any]:
    from vllm_loopus.trace.convergence import convergence
    from vllm_loopus.trace.record import document

    record = record_of(config)
    return document(
        model,
        engine.value,
        dtype.value,
        record.name,
        record.exit_rule.from_config(config),
        [one.trace for one in found],
        convergence(one.values for one in found),
    )


def _write(
    document: dict[str, Any],
    json_file: Path | None,
    html: Path | None,
    trajectories: Path | None,
    convergence: Path | None,
) -> None:
    from vllm_loopus.trace import page, record

    with report_errors(OSError):
        if json_file == STDOUT:
            print_json(document)
        elif json_file is not None:
            record.write(document, json_file)
        if html is not None:
            write_text(html, page.render(document))
        if trajectories is not None or convergence is not None:
            from vllm_loopus.trace import pictures  # imports matplotlib

            name = document["model"]
            if trajectories is not None:
                figure = pictures.draw_trajectories(document["traces"][0], name)
                pictures.save(figure, trajectories)
            if convergence is not None:
                figure = pictures.draw_convergence(document["convergence"], name)
                pictures.save(figure, convergence)


def _report_differences(
    found: "Sequence[Traced]", others: "Sequence[Answer]", agreed: str, exact: bool
) -> None:
    """Prints differences. Exits with code 1 if one is not due to rounding (`exact`: float32)."""
    from vllm_loopus.trace.tracing import difference

    differences = {
        index: problem
        for index, (one, other) in enumerate(zip(found, others, strict=True))
        if (problem := difference(one, other)) is not None
    }
    for index, problem in differences.items():
        typer.echo(f"prompt {index}: transformers and vLLM differ. {problem}", err=True)
    if not differences and agreed:
        typer.echo(agreed, err=True)
    if exact and any(problem.certain for problem in differences.values()):
        raise typer.Exit(PROBLEM)
