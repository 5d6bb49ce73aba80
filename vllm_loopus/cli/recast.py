"""`vllm-loopus recast`, `analyze` and `convert`: from a pretrained model to a LoopUS checkpoint."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_loopus.cli.output import JsonOption, errors_told, print_json
from vllm_loopus.recast import convert as writing
from vllm_loopus.recast.about import Conversion, Story
from vllm_loopus.recast.analysis import AnalysisOptions, analyse_base, can_analyse
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.cut import Cut, ScoredCut, parse_decoder, parse_encoder, range_text
from vllm_loopus.recast.output import check_output

DEFAULTS = AnalysisOptions()

BaseArgument = Annotated[
    str, typer.Argument(help="The pretrained model: a folder, an alias, or owner/name on the hub.")
]
OutOption = Annotated[Path, typer.Option(help="Folder to write. It appears when it is complete.")]
EncoderOption = Annotated[
    str | None, typer.Option(help="Layers of the encoder, 0..1 or none. Default: the rule's.")
]
DecoderOption = Annotated[
    str | None, typer.Option(help="Layers of the decoder, 27..27 or none. Default: the rule's.")
]
SampleOption = Annotated[
    str,
    typer.Option(
        help="Text to analyse on: a file (text, JSONL), a data set (name:config:split), built-in."
    ),
]
FieldOption = Annotated[
    str | None, typer.Option("--text-field", help="The text's field in JSONL and data sets.")
]
TokensOption = Annotated[int, typer.Option(min=16, help="Tokens to analyse at most.")]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Tokenizer, where the model has none of its own.")
]
DeviceOption = Annotated[
    str, typer.Option(help="Where to analyse: cpu, cuda, cuda:1, or auto. Weights are streamed.")
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(help="Keep the model on its devices instead, by transformers' device_map (auto)."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
ShardOption = Annotated[str, typer.Option(help="Size of a weight file at most.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a checkpoint at OUT.")]


class Dtype(StrEnum):
    """What to compute the analysis in; auto: the checkpoint's dtype where the device is fast."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Format(StrEnum):
    """Layout of a checkpoint: ours, or the released one."""

    LOOPUS = "loopus"
    LDS = "lds"


DtypeOption = Annotated[Dtype, typer.Option(help="What to compute the analysis in.")]
FormatOption = Annotated[
    Format, typer.Option("--format", help="loopus, or lds: the released layout.")
]


def recast(
    base: BaseArgument,
    out: OutOption,
    encoder: EncoderOption = None,
    decoder: DecoderOption = None,
    max_loops: Annotated[int, typer.Option(help="The recursion budget N.")] = 8,
    min_loops: Annotated[int, typer.Option(help="The least depth a token may leave at.")] = 1,
    exit_threshold: Annotated[float, typer.Option(help="Confidence to leave at.")] = 0.6,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of gate and confidence head.")
    ] = 0,
    checkpoint_format: FormatOption = Format.LOOPUS,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    analysis: Annotated[
        bool, typer.Option("--analysis/--no-analysis", help="Analyse the base's hidden states.")
    ] = True,
    sample: SampleOption = DEFAULTS.sample,
    text_field: FieldOption = None,
    tokens: TokensOption = DEFAULTS.tokens,
    length: LengthOption = DEFAULTS.length,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = DEFAULTS.device,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a pretrained model into a LoopUS checkpoint that vLLM serves.

    Where to cut follows from the model's own hidden states, or is given by hand.
    """
    wanted = AnalysisOptions(
        sample, text_field, tokens, length, tokenizer, device, device_map, dtype.value
    )
    fields = {"max_loops": max_loops, "min_loops": min_loops, "exit_threshold": exit_threshold}
    with errors_told(ValueError, OSError):
        options = writing.WriteOptions(checkpoint_format.value, max_shard_size, force)
        opened = Base.open(base, revision)
        first, last = _by_hand(encoder, decoder, opened.num_layers)
        ends = {"encoder": first, "decoder": last}
        given = [name for name, end in ends.items() if end is not None]
        by_hand = len(given) == len(ends)
        # Whatever can be wrong is found before the long part begins.
        writing.plan(opened, Cut(opened.num_layers, first or 0, last or 0), seed, **fields)
        check_output(out, force=force, needed=opened.nbytes, reads=opened.folder)
        if not analysis and not by_hand:
            raise ValueError("--no-analysis leaves no rule to cut by; give --encoder and --decoder")
        found = None
        if by_hand and analysis and not can_analyse(opened, wanted):
            typer.echo(f"{base} has no tokenizer: not analysed, no report", err=True)
        elif by_hand and analysis:
            found = analyse_base(opened, wanted)
        elif analysis:
            found = analyse_base(opened, wanted, first, last)
        if first is not None and last is not None:
            cut = Cut(opened.num_layers, first, last)
        else:
            assert found is not None
            cut = found.ranking[0].cut
        config, _ = writing.plan(opened, cut, seed, **fields)
        command = ["vllm-loopus", *sys.argv[1:]]
        story = Story(opened, cut, config, seed, given, command, found)
        writing.recast(
            opened,
            out,
            encoder=cut.encoder,
            decoder=cut.decoder,
            seed=seed,
            options=replace(options, finish=story.write),
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
        _print_ranking(found.ranking, cut)
    typer.echo(f"{out}: {cut}. {story.chosen_by}.")
    if found is not None:
        typer.echo(f"Curves: {out / 'report.html'}")
    typer.echo(f"Serve it: vllm serve {_as_path(out)} --host 127.0.0.1")


def analyze(
    base: BaseArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html, the picture and the numbers.")
    ] = None,
    encoder: EncoderOption = None,
    decoder: DecoderOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write into OUT if it exists.")] = False,
    sample: SampleOption = DEFAULTS.sample,
    text_field: FieldOption = None,
    tokens: TokensOption = DEFAULTS.tokens,
    length: LengthOption = DEFAULTS.length,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = DEFAULTS.device,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = Dtype.AUTO,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a model's hidden states change by layer, and where the rule would cut it."""
    wanted = AnalysisOptions(
        sample, text_field, tokens, length, tokenizer, device, device_map, dtype.value
    )
    with errors_told(ValueError, OSError):
        opened = Base.open(base, revision)
        first, last = _by_hand(encoder, decoder, opened.num_layers)
        if out is not None:
            if os.path.lexists(out) and not (force and out.is_dir()):
                raise FileExistsError(f"out={out} exists; choose another folder or give --force")
            out.mkdir(parents=True, exist_ok=True)
        found = analyse_base(opened, wanted, first, last)
        cut, numbers = found.ranking[0].cut, found.to_dict()
        if out is not None:
            from vllm_loopus.recast.report import write_report  # matplotlib: only where drawn

            write_report(out, numbers, cut, found.against_published or "The best by the rule")
    if as_json:
        print_json(numbers)
        return
    table = Table("layer", "block", "similarity", "update / input", "norm", "lens KL")
    blocks = [block for block, run in cut.runs.items() for _ in run]
    for layer, similarity in enumerate(numbers["similarity"]):
        values = (numbers[name][layer] for name in ("step", "norm", "lens_kl"))
        cells = (f"{value:.3f}" for value in values)
        table.add_row(str(layer), blocks[layer], f"{similarity:.4f}", *cells)
    Console().print(table)
    _print_ranking(found.ranking, cut)
    if found.against_published:
        typer.echo(f"{found.against_published}.")


def convert(
    source: Annotated[str, typer.Argument(help="A LoopUS checkpoint: folder, alias, owner/name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write. It appears when it is complete.")],
    checkpoint_format: FormatOption = Format.LOOPUS,
    max_shard_size: ShardOption = "5GB",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a LoopUS checkpoint in the other format; tensors keep every byte."""
    with errors_told(ValueError, OSError):
        options = writing.WriteOptions(checkpoint_format.value, max_shard_size, force)
        story = Conversion(source, checkpoint_format.value, ["vllm-loopus", *sys.argv[1:]])
        config = writing.convert(source, out, replace(options, finish=story.write))
    if as_json:
        result = {"out": str(out), "format": checkpoint_format.value, "max_loops": config.max_loops}
        print_json(result)
    else:
        typer.echo(f"{out}: {source} in format {checkpoint_format.value}")


def _by_hand(
    encoder: str | None, decoder: str | None, num_layers: int
) -> tuple[int | None, int | None]:
    """Layers of encoder and decoder where given. Raises `ValueError`."""
    first = None if encoder is None else parse_encoder(encoder, num_layers)
    last = None if decoder is None else parse_decoder(decoder, num_layers)
    one_end = (first is None) != (last is None)
    # Raises when nothing is left to loop; the rule gives the other end a layer at least.
    Cut(num_layers, (first or 0) + one_end, last or 0)
    return first, last


def _print_ranking(ranking: Sequence[ScoredCut], cut: Cut, most: int = 5) -> None:
    table = Table("score", "encoder", "reasoning", "decoder", title="cuts by the rule")
    for ranked in ranking[:most]:
        style = "bold" if ranked.cut == cut else None
        runs = (range_text(run) for run in ranked.cut.runs.values())
        table.add_row(f"{ranked.score:.4f}", *runs, style=style)
    Console().print(table)


def _as_path(out: Path) -> str:
    """How `out` is written for vLLM: a bare name would be taken for a repository's."""
    return shlex.quote(str(out) if out.is_absolute() or out.parts[0] == ".." else f"./{out}")
