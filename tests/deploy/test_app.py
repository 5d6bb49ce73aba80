"""The files of a Ray Serve application, and what is refused instead."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vllm_loopus.cli.main import app


def deploy(out: Path, *options: str) -> Any:
    command = ["deploy", "loopus-tiny", "--out", str(out), "--device", "cpu", *options]
    return CliRunner().invoke(app, command)


def test_written(tmp_path: Path) -> None:
    args = {
        "max_model_len": 64,
        "hf_overrides": {"max_loops": 6},
        "additional_config": {"loopus": {"reasoning_effort": {"low": 2}}},
    }
    out = tmp_path / "app"
    result = deploy(out, "--replicas", "3", "--engine-args", json.dumps(args), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"] == [str(out / "app.yaml"), str(out / "README.md")]
    (application,) = yaml.safe_load((out / "app.yaml").read_text())["applications"]
    (engine,) = application["args"]["llm_configs"]
    assert engine["engine_kwargs"] == args
    assert Path(engine["model_loading_config"]["model_source"]).is_dir()
    assert engine["placement_group_config"] == {"bundle_per_worker": {"CPU": 1}}
    deployment = engine["deployment_config"]
    assert deployment["num_replicas"] == 3
    router = deployment["request_router_config"]["request_router_kwargs"]
    assert router == {"max_loops": 6, "default_tokens": 256, "efforts": {"low": 2}}
    assert "loopus-tiny" in (out / "README.md").read_text()
    again = deploy(out)
    assert again.exit_code == 2 and "exists; choose another folder or give --force" in again.output
    assert deploy(out, "--force", "--replicas", "2").exit_code == 0


def test_accepted_by_ray_serve(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve.llm", reason="Ray Serve LLM is not installed")
    from ray.serve.llm import LLMServingArgs
    from ray.serve.schema import ServeDeploySchema

    assert deploy(tmp_path / "app").exit_code == 0
    content = yaml.safe_load((tmp_path / "app" / "app.yaml").read_text())
    ServeDeploySchema.model_validate(content)
    (config,) = LLMServingArgs.model_validate(content["applications"][0]["args"]).llm_configs
    from vllm_loopus.deploy.router import LoopBudgetRouter

    router = config.deployment_config["request_router_config"]
    from ray.serve.config import RequestRouterConfig

    assert RequestRouterConfig(**router).get_request_router_class() is LoopBudgetRouter


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine-args", "[]"], "engine_args='[]' must be a JSON object"),
        (["--engine-args", '{"max_model_lem": 3}'], "did you mean 'max_model_len'?"),
        (["--engine-args", '{"model": "x"}'], "which Ray Serve LLM sets"),
        (["--engine-args", '{"data_parallel_size": 2}'], "give --replicas"),
        (["--engine-args", '{"hf_overrides": {"max_loops": 0}}'], "max_loops"),
        (["--engine-args", '{"additional_config": {"loopus": {"x": 1}}}'], "has no option 'x'"),
        (["--accelerator-type", "H100"], "excludes --device cpu"),
        (["--replicas", "0"], "replicas"),
        (["--max-queued-requests", "0"], "max_queued_requests=0 must be -1 (no limit) or 1 or"),
    ],
)
def test_refused(tmp_path: Path, options: list[str], told: str) -> None:
    result = deploy(tmp_path / "app", *options)
    assert result.exit_code == 2 and told in " ".join(result.output.split())
    assert not (tmp_path / "app").exists()
