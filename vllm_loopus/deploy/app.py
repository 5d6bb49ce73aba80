"""Writes the files of a Ray Serve LLM application."""

import copy
import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_loopus.architectures import LoopedConfig
from vllm_loopus.files import write_text
from vllm_loopus.serving.knobs.engine import EngineOptions

APP, GUIDE = "app.yaml", "README.md"
ROUTER = "vllm_loopus.deploy.router:LoopBudgetRouter"
BUILDER = "ray.serve.llm:build_openai_app"
SERVE_OPTIONS = ("model", "served_model_name", "distributed_executor_backend")


@dataclass(frozen=True)
class Deployment:
    """Options of the application.

    - `name`: the served model name. `target`: the checkpoint, at the same path on every node.
    - `accelerator`: Ray's name of the GPU type, None for any. `on_cpus`: run without GPUs.
    - `cpus`: Ray CPUs per rank, if `on_cpus`.
    - `max_ongoing`: maximum requests that a replica runs at a time. `max_queued`: maximum requests
      that wait in an ingress process before it answers 503; -1 for no limit.
    - `default_tokens`: tokens assumed for routing if a request has no limit.
    """

    name: str
    target: str
    replicas: int
    engine_args: dict[str, Any] = field(default_factory=dict)
    accelerator: str | None = None
    on_cpus: bool = False
    cpus: float = 1
    host: str = "127.0.0.1"
    port: int = 8000
    max_ongoing: int = 256
    max_queued: int = -1
    default_tokens: int = 256


def check(deployment: Deployment) -> None:
    """Raises `ValueError` with option, value and fix for invalid options."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = deployment.engine_args
    for name in SERVE_OPTIONS:
        if name in args:
            raise ValueError(f"engine_args has {name!r}, which Ray Serve LLM sets; leave it out")
    known = {known.name for known in fields(AsyncEngineArgs)}
    if unknown := [name for name in args if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "use the names of vLLM's AsyncEngineArgs"
        raise ValueError(f"engine_args has {unknown[0]!r}, which vLLM does not know; {hint}")
    if args.get("data_parallel_size", 1) != 1:
        raise ValueError(
            f"engine_args has data_parallel_size={args['data_parallel_size']!r}, which is not "
            "supported; give --replicas"
        )
    if deployment.max_queued != -1 and deployment.max_queued < 1:
        raise ValueError(
            f"max_queued_requests={deployment.max_queued} must be -1 (no limit) or 1 or more"
        )
    if deployment.accelerator is not None and deployment.on_cpus:
        raise ValueError(
            f"accelerator_type={deployment.accelerator!r} excludes --device cpu; remove one"
        )


def application(deployment: Deployment, config: LoopedConfig) -> dict[str, Any]:
    """The configuration that `serve run` and `serve deploy` read. `config`: of the checkpoint.

    Raises `ValueError` for overrides and options that do not fit the checkpoint.
    """
    overrides = deployment.engine_args.get("hf_overrides") or {}
    if not isinstance(overrides, dict):
        raise ValueError(f"hf_overrides={overrides!r} must be a JSON object")
    served = copy.deepcopy(config)
    for name, value in overrides.items():
        setattr(served, name, value)
    served.check()
    options = EngineOptions.of(deployment.engine_args.get("additional_config"))
    options.check(served)
    router: dict[str, Any] = {
        "max_loops": served.max_loops,
        "default_tokens": deployment.default_tokens,
    }
    if options.reasoning_effort:
        router["efforts"] = dict(options.reasoning_effort)
    engine: dict[str, Any] = {
        "model_loading_config": {
            "model_id": deployment.name,
            "model_source": deployment.target,
        },
        "engine_kwargs": deployment.engine_args,
        "deployment_config": {
            "num_replicas": deployment.replicas,
            "max_ongoing_requests": deployment.max_ongoing,
            "max_queued_requests": deployment.max_queued,
            "request_router_config": {
                "request_router_class": ROUTER,
                "request_router_kwargs": router,
            },
        },
    }
    if deployment.on_cpus:
        engine["placement_group_config"] = {"bundle_per_worker": {"CPU": deployment.cpus}}
    if deployment.accelerator is not None:
        engine["accelerator_type"] = deployment.accelerator
    return {
        "http_options": {"host": deployment.host, "port": deployment.port},
        "applications": [
            {
                "name": "loopus",
                "route_prefix": "/",
                "import_path": BUILDER,
                "args": {
                    "llm_configs": [engine],
                    # With a single ingress process, its router knows the budgets of all requests.
                    "ingress_deployment_config": {"num_replicas": 1},
                },
            }
        ],
    }


def write(deployment: Deployment, config: LoopedConfig, out: Path) -> list[Path]:
    """Writes the application to the folder `out`. Returns the files. Raises `ValueError`."""
    check(deployment)
    content = yaml.safe_dump(application(deployment, config), sort_keys=False)
    templates = Environment(
        loader=PackageLoader("vllm_loopus.deploy"), undefined=StrictUndefined, trim_blocks=True
    )
    guide = templates.get_template("README.md.j2").render(deployment=deployment, app=APP)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in ((APP, content), (GUIDE, guide)):
        write_text(out / name, text)
    return [out / APP, out / GUIDE]
