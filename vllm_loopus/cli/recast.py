"""`vllm-loopus recast`, `analyze` and `convert`: make LoopUS checkpoints."""

import math
import os
import shlex
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_loopus.cli.output import JsonOption, print_json, report_errors
from vllm_loopus.cli.recast_recursive import (
    LoopsOption,
    Method,
    MethodOption,
    RankOption,
    TieOption,
    check_method,
    recast_recursively,
)
from vllm_loopus.recast import convert as writing
from vllm_loopus.recast.analysis import Analysis, AnalysisOptions, analyse_base, can_analyse
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.cut import Cut, parse_decoder, parse_encoder, range_text
from vllm_loopus.recast.gguf_file import find_gguf, write_plain
from vllm_loopus.recast.output import check_output
from vllm_loopus.recast.provenance import ConversionRecord, RecastRecord, unpacked_record

DEFAULTS = AnalysisOptions()

BaseArgument = Annotated[
    str,
    typer.Argument(
        help="The pretrained model: a folder, a GGUF file, an alias, or owner/name on the hub."
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder to write; created only when complete.")]
EncoderOption = Annotated[
    str | None, typer.Option(help="Encoder layers: 0..1 or none. Default: by the cutting rule.")
]
DecoderOption = Annotated[
    str | None, typer.Option(help="Decoder layers: 27..27 or none. Default: by the cutting rule.")
]
SampleOption = Annotated[
    str,
    typer.Option(
        help="Text for the analysis: a file (text, JSONL), a data set (name:config:split) or "
        "built-in."
    ),
]
FieldOption = Annotated[
    str | None, typer.Option("--text-field", help="Field with the text in JSONL and data sets.")
]
TokensOption = Annotated[int, typer.Option(min=16, help="Maximum tokens to analyse.")]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")]
TryOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Tokens on which untrained cuts are tried; 0: cuts by the profile of angles alone.",
    ),
]
TokenizerOption = Annotated[str | None, typer.Option(help="Tokenizer, if the model has none.")]
DeviceOption = Annotated[
    str,
    typer.Option(help="Device of the analysis: cpu, cuda, cuda:1 or auto. Weights are streamed."),
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(help="Load the whole model instead, with transformers' device_map (auto)."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
ShardOption = Annotated[str, typer.Option(help="Maximum size of a weight file.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a checkpoint at OUT.")]


class Dtype(StrEnum):
    """Dtypes of the analysis; auto: the checkpoint's if the device supports it natively."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Format(StrEnum):
    """Checkpoint formats: ours, and the released one."""

    LOOPUS = "loopus"
    LDS = "lds"


DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the analysis.")]
FormatOption = Annotated[
    Format, typer.Option("--format", help="loopus, or lds for the released format.")
]


def recast(
    context: typer.Context,
    base: BaseArgument,
    out: OutOption,
    method: MethodOption = Method.LOOPUS,
    loops: LoopsOption = None,
    lora_rank: RankOption = None,
    tie: TieOption = "stepwise",
    encoder: EncoderOption = None,
    decoder: DecoderOption = None,
    max_loops: Annotated[int, typer.Option(help="The recursion budget N.")] = 8,
    min_loops: Annotated[int, typer.Option(help="Minimum exit depth of a token.")] = 1,
    exit_threshold: Annotated[
        float, typer.Option(help="Confidence above which tokens exit.")
    ] = 0.6,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of gate and confidence head.")
    ] = 0,
    checkpoint_format: FormatOption = Format.LOOPUS,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    analysis: Annotated[
        bool, typer.Option("--analysis/--no-analysis", help="Analyse the model's hidden states.")
    ] = True,
    sample: SampleOption = DEFAULTS.sample,
    text_field: FieldOption = None,
    tokens: TokensOption = DEFAULTS.tokens,
    length: LengthOption = DEFAULTS.length,
    try_tokens: TryOption = DEFAULTS.try_tokens,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = DEFAULTS.device,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a pretrained model to a looped checkpoint that vLLM can serve.

    LoopUS: the cut is found by analysing the model's hidden states, or given by --encoder and
    --decoder. Recursive (--method recursive --loops B --lora-rank R): layers are tied.
    """
    wanted = AnalysisOptions(
        sample, text_field, tokens, length, tokenizer, device, device_map, dtype.value, try_tokens
    )
    fields = {"max_loops": max_loops, "min_loops": min_loops, "exit_threshold": exit_threshold}
    command = ["vllm-loopus", *sys.argv[1:]]
    with report_errors(ValueError, OSError):
        check_method(context, method)
        options = writing.WriteOptions(checkpoint_format.value, max_shard_size, force)
        if method is Method.RECURSIVE:
            numbers = recast_recursively(
                base,
                out,
                loops=loops,
                lora_rank=lora_rank,
                tie=tie,
                seed=seed,
                device=device,
                options=options,
                revision=revision,
                command=command,
            )
            _say_recursive(out, numbers, as_json)
            return
        opened = Base.open(base, revision)
        _tell_dtypes(opened)
        first, last = _by_hand(encoder, decoder, opened.num_layers)
        ends = {"encoder": first, "decoder": last}
        given = [name for name, end in ends.items() if end is not None]
        by_hand = len(given) == len(ends)
        # Check everything before the long part starts.
        writing.plan(opened, Cut(opened.num_layers, first or 0, last or 0), seed, **fields)
        check_output(out, force=force, needed=opened.nbytes, reads=opened.source)
        if not analysis and not by_hand:
            raise ValueError("--no-analysis needs a cut; give --encoder and --decoder")
        found = None
        if by_hand and analysis and not can_analyse(opened, wanted):
            typer.echo(f"{base} has no tokenizer, so it is not analysed; no report", err=True)
        elif by_hand and analysis:
            hand = Cut(opened.num_layers, first or 0, last or 0)
            found = analyse_base(opened, wanted, by_hand=hand, seed=seed)
        elif analysis:
            found = analyse_base(opened, wanted, first, last, seed=seed)
        if first is not None and last is not None:
            cut = Cut(opened.num_layers, first, last)
        else:
            assert found is not None
            cut = found.ranking[0].cut
        config, _ = writing.plan(opened, cut, seed, **fields)
        record = RecastRecord(opened, cut, config, seed, given, command, found)
        writing.recast(
            opened,
            out,
            encoder=cut.encoder,
            decoder=cut.decoder,
            seed=seed,
            options=replace(options, finish=record.write),
            **fields,
        )
    if as_json:
        result: dict[str, Any] = {"out": str(out), "base": base, "cut": cut.runs}
        if found is not None:
            numbers = found.to_dict()
            result |= {name: numbers[name] for name in ("ranking", "published_cut")}
        print_json(result)
        return
    if found is not None:
        _print_ranking(found, cut)
    typer.echo(f"{out}: {cut}. {record.chosen_by}.")
    if found is not None:
        typer.echo(f"Curves: {out / 'report.html'}")
    typer.echo(f"Serve it: vllm serve {_as_path(out)} --host 127.0.0.1")


def _say_recursive(out: Path, numbers: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json({"out": str(out), **numbers})
        return
    sizes = numbers["parameters"]
    typer.echo(
        f"{out}: {numbers['loops']} loops of {numbers['block_size']} layers, tied by "
        f"{numbers['tie']}. Parameters: {sizes['tied']:,} tied and {sizes['lora']:,} of LoRA, "
        f"{sizes['base']:,} in the base."
    )
    typer.echo(f"Report: {out / 'report.html'}")
    typer.echo(f"Serve it: vllm serve {_as_path(out)} --host 127.0.0.1")


def analyze(
    base: BaseArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html, the picture and the JSON.")
    ] = None,
    encoder: EncoderOption = None,
    decoder: DecoderOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write to OUT even if it exists.")] = False,
    sample: SampleOption = DEFAULTS.sample,
    text_field: FieldOption = None,
    tokens: TokensOption = DEFAULTS.tokens,
    length: LengthOption = DEFAULTS.length,
    try_tokens: TryOption = DEFAULTS.try_tokens,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = DEFAULTS.device,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a model's hidden states change by layer, and the cuts by the rule."""
    wanted = AnalysisOptions(
        sample, text_field, tokens, length, tokenizer, device, device_map, dtype.value, try_tokens
    )
    with report_errors(ValueError, OSError):
        opened = Base.open(base, revision)
        first, last = _by_hand(encoder, decoder, opened.num_layers)
        if out is not None:
            if os.path.lexists(out) and not (force and out.is_dir()):
                raise FileExistsError(f"out={out} exists; choose another folder or give --force")
            out.mkdir(parents=True, exist_ok=True)
        found = analyse_base(opened, wanted, first, last)
        cut, numbers = found.ranking[0].cut, found.to_dict()
        if out is not None:
            from vllm_loopus.recast.report import write_report  # imports matplotlib

            write_report(out, numbers, cut, found.against_published or "The best by the rule")
    if as_json:
        print_json(numbers)
        return
    table = Table("layer", "part", "similarity", "update / input", "norm", "lens KL")
    parts = [part for part, run in cut.runs.items() for _ in run]
    for layer, similarity in enumerate(numbers["similarity"]):
        values = (numbers[name][layer] for name in ("step", "norm", "lens_kl"))
        cells = (f"{value:.3f}" for value in values)
        table.add_row(str(layer), parts[layer], f"{similarity:.4f}", *cells)
    Console().print(table)
    _print_ranking(found, cut)
    if found.against_published:
        typer.echo(f"{found.against_published}.")


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A LoopUS checkpoint: folder, alias, owner/name. Or a GGUF file."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; created only when complete.")],
    checkpoint_format: FormatOption = Format.LOOPUS,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a LoopUS checkpoint to the other format; tensors are copied byte for byte.

    A GGUF file is written as a plain checkpoint in float32, for training and evaluation.
    """
    with report_errors(ValueError, OSError):
        if (file := find_gguf(source)) is not None:
            if checkpoint_format is not Format.LOOPUS:
                raise ValueError(
                    f"format={checkpoint_format.value} is for LoopUS checkpoints, and {file} is a "
                    "plain model; leave it out"
                )
            _convert_gguf(file, out, max_shard_size, force, as_json)
            return
        options = writing.WriteOptions(checkpoint_format.value, max_shard_size, force)
        record = ConversionRecord(source, checkpoint_format.value, ["vllm-loopus", *sys.argv[1:]])
        config = writing.convert(source, out, replace(options, finish=record.write))
    if as_json:
        result = {"out": str(out), "format": checkpoint_format.value, "max_loops": config.max_loops}
        print_json(result)
    else:
        typer.echo(f"{out}: {source} in format {checkpoint_format.value}")


def _tell_dtypes(opened: Base) -> None:
    if len(opened.dtypes) > 1:
        held = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in opened.dtypes.items())
        typer.echo(
            f"note: the weights of {opened.name} have several dtypes, which are kept: {held}; "
            f"served and trained in one, {opened.config.dtype or 'that of the embedding'} by "
            "default",
            err=True,
        )


def _convert_gguf(file: Path, out: Path, max_shard_size: str, force: bool, as_json: bool) -> None:
    command = ["vllm-loopus", *sys.argv[1:]]
    write_plain(
        file,
        out,
        lambda opened: unpacked_record(opened, command),
        force=force,
        max_shard_size=max_shard_size,
    )
    if as_json:
        print_json({"out": str(out), "format": "plain"})
    else:
        typer.echo(f"{out}: {file} as a plain checkpoint in float32")


def _by_hand(
    encoder: str | None, decoder: str | None, num_layers: int
) -> tuple[int | None, int | None]:
    """The numbers of encoder and decoder layers; None if not given. Raises `ValueError`."""
    first = None if encoder is None else parse_encoder(encoder, num_layers)
    last = None if decoder is None else parse_decoder(decoder, num_layers)
    one_end = (first is None) != (last is None)
    # Raises if nothing is left to loop. The rule gives the other part at least one layer.
    Cut(num_layers, (first or 0) + one_end, last or 0)
    return first, last


def _print_ranking(found: Analysis, cut: Cut, most: int = 5) -> None:
    tried = found.untrained
    title = "cuts by the rule"
    if tried is not None:
        title = f"cuts by untrained loss over {tried.tokens} tokens (base: {tried.base:.3f})"
    losses = ("loss, depth 1", "loss, depth 2") if tried is not None else ()
    table = Table(*losses, "score", "encoder", "reasoning", "decoder", title=title)
    for place, ranked in enumerate(found.ranking):
        if place >= most and ranked.cut != cut and not (tried and ranked.losses):
            continue
        runs = (range_text(run) for run in ranked.cut.runs.values())
        cells = [f"{loss:.3f}" for loss in ranked.losses or [math.nan] * len(losses)]
        style = "bold" if ranked.cut == cut else None
        table.add_row(*cells, f"{ranked.score:.4f}", *runs, style=style)
    Console().print(table)


def _as_path(out: Path) -> str:
    """`out` as an argument for vLLM, which takes a name without `/` for a repository."""
    return shlex.quote(str(out) if out.is_absolute() or out.parts[0] == ".." else f"./{out}")
