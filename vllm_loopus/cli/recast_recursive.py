"""`vllm-loopus recast --method recursive`: makes a relaxed recursive transformer."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_loopus.architectures.recursive.config import TIES
from vllm_loopus.recast.analysis import device_named
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.convert import WriteOptions
from vllm_loopus.recast.output import check_output
from vllm_loopus.recast.recursive import plan
from vllm_loopus.recast.recursive_record import RecursiveRecord


class Method(StrEnum):
    """What a base is recast as."""

    LOOPUS = "loopus"
    RECURSIVE = "recursive"


# Options of `recast` that belong to one method.
ONLY_RECURSIVE = ("loops", "lora_rank", "tie")
ONLY_LOOPUS = (
    "encoder", "decoder", "max_loops", "min_loops", "exit_threshold", "checkpoint_format",
    "analysis", "sample", "text_field", "tokens", "length", "tokenizer", "device_map", "dtype",
)  # fmt: skip

MethodOption = Annotated[
    Method,
    typer.Option(help="loopus, or recursive: tied layers with LoRA by loop (arXiv 2410.20672)."),
]
LoopsOption = Annotated[
    int | None, typer.Option(help="recursive: how often the block of tied layers is run.")
]
RankOption = Annotated[
    int | None, typer.Option(help="recursive: rank of the LoRA of each loop; 0 for none.")
]
TieOption = Annotated[str, typer.Option(help=f"recursive: how layers are tied: {', '.join(TIES)}.")]


def check_method(context: typer.Context, method: Method) -> None:
    """Raises `ValueError` for an option of the other method."""
    foreign = ONLY_LOOPUS if method is Method.RECURSIVE else ONLY_RECURSIVE
    for name in foreign:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = {"checkpoint_format": "format"}.get(name, name).replace("_", "-")
            raise ValueError(
                f"--{option} {context.params[name]} has no effect with --method {method.value}; "
                "leave it out"
            )


def recast_recursively(
    base: str,
    out: Path,
    *,
    loops: int | None,
    lora_rank: int | None,
    tie: str,
    seed: int,
    device: str,
    options: WriteOptions,
    revision: str | None,
    command: list[str],
) -> dict[str, Any]:
    """Writes the checkpoint to `out` and returns the values of its report.

    Raises `ValueError` with field, value and fix before anything is computed or written.
    """
    if loops is None:
        raise ValueError("--method recursive needs --loops B, a divisor of the number of layers")
    if lora_rank is None:
        raise ValueError("--method recursive needs --lora-rank R, the rank of the LoRA (0: none)")
    opened = Base.open(base, revision, min_layers=1)
    planned = plan(
        opened, loops=loops, lora_rank=lora_rank, tie=tie, seed=seed, device=device_named(device)
    )
    check_output(out, force=options.force, needed=planned.nbytes, reads=opened.folder)
    record = RecursiveRecord(planned, seed, command)
    planned.write(out, replace(options, finish=record.write))
    return record.numbers()
