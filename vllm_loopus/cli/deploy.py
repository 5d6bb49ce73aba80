"""`vllm-loopus deploy MODEL`: writes the files of a Ray Serve LLM application."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vllm_loopus.cli.info import ModelArgument, load_config, resolve
from vllm_loopus.cli.output import (
    JsonOption,
    absolute,
    json_object,
    print_json,
    report_errors,
)


class Device(StrEnum):
    """Devices of the engines."""

    GPU = "gpu"
    CPU = "cpu"


def deploy(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    replicas: Annotated[int, typer.Option(min=1, help="Number of engines.")] = 1,
    engine_args: Annotated[
        str,
        typer.Option(help='vLLM engine arguments as JSON: {"tensor_parallel_size": 2}.'),
    ] = "{}",
    name: Annotated[
        str | None, typer.Option(help="The model name that clients use. Default: MODEL.")
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="Device of the engines. Default: gpu if one is here."),
    ] = None,
    accelerator_type: Annotated[
        str | None, typer.Option(help="Ray's name of the GPU type, for example H100.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Ray CPUs per rank, without GPUs.")] = 1,
    host: Annotated[str, typer.Option(help="Address that Ray Serve listens on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port that Ray Serve listens on.")
    ] = 8000,
    max_ongoing_requests: Annotated[
        int, typer.Option(min=1, help="Maximum requests that a replica runs at a time.")
    ] = 256,
    max_queued_requests: Annotated[
        int, typer.Option(min=-1, help="Maximum waiting requests before a 503; -1 for no limit.")
    ] = -1,
    default_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens assumed for requests without max_tokens in routing.")
    ] = 256,
    force: Annotated[bool, typer.Option("--force", help="Replace an application in OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a Ray Serve LLM application whose router balances loop budgets."""
    with report_errors(ValueError, OSError):
        config = load_config(model)
        target = absolute(resolve(model))
        from vllm_loopus.deploy import app

        if (out / app.APP).exists() and not force:
            raise ValueError(f"{out / app.APP} exists; choose another folder or give --force")
        if out.exists() and not out.is_dir():
            raise ValueError(f"out={out} is a file; choose another name")
        args = json_object("engine_args", engine_args)
        deployment = app.Deployment(
            name=name or model,
            target=target,
            replicas=replicas,
            engine_args=args,
            accelerator=accelerator_type,
            on_cpus=_on_cpus(device, accelerator_type),
            cpus=cpus,
            host=host,
            port=port,
            max_ongoing=max_ongoing_requests,
            max_queued=max_queued_requests,
            default_tokens=default_tokens,
        )
        files = app.write(deployment, config, out)
    if as_json:
        print_json({"files": [str(file) for file in files]})
    else:
        for file in files:
            typer.echo(f"wrote {file}")
        typer.echo(f"start it: serve run {out / app.APP}")


def _on_cpus(device: Device | None, accelerator_type: str | None) -> bool:
    if device is not None:
        return device is Device.CPU
    import torch

    return accelerator_type is None and not torch.cuda.is_available()
