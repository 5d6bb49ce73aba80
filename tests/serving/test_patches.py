"""Catalogue, diffs, run-time patches and the installed vLLM agree."""

import importlib
import subprocess
import sys
import tomllib
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import vllm

from vllm_loopus.plugin import register
from vllm_loopus.serving.patches import MARK, PATCHES, Patch

FOLDER = Path(__file__).parents[2] / "patches"
CATALOGUE = tomllib.loads((FOLDER / "catalogue.toml").read_text())


def test_catalogue_is_what_is_applied() -> None:
    assert CATALOGUE.keys() == {patch.key for patch in PATCHES}
    for patch in PATCHES:
        entry = CATALOGUE[patch.key]
        assert entry["target"] == f"{patch.module}.{patch.name}"
        assert entry["why"].strip() and entry["remove_when"].strip()
    assert {entry["diff"] for entry in CATALOGUE.values()} == {
        f.name for f in FOLDER.glob("*.diff")
    }


@pytest.mark.parametrize("diff", sorted(FOLDER.glob("*.diff")), ids=lambda path: path.name)
def test_diffs_apply_to_the_installed_vllm(diff: Path, tmp_path: Path) -> None:
    site = Path(vllm.__file__).parents[1]
    for line in diff.read_text().splitlines():
        if line.startswith("--- a/"):
            target = tmp_path / line.removeprefix("--- a/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text((site / line.removeprefix("--- a/")).read_text())
    command = ["git", "apply", "--check", str(diff)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def installed(patch: Patch) -> Any:
    return attrgetter(patch.name)(importlib.import_module(patch.module))


def test_applied_once() -> None:
    register()
    before = [installed(patch) for patch in PATCHES]
    register()
    after = [installed(patch) for patch in PATCHES]
    assert before == after
    for patch, function in zip(PATCHES, after, strict=True):
        assert getattr(function, MARK) == patch.key
        assert not hasattr(function.__wrapped__, MARK)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [("gone_function", (), "is gone"), ("init_logger", ("a", "b"), "takes")],
)
def test_a_changed_vllm_is_noticed(name: str, parameters: tuple, message: str) -> None:
    patch = Patch("x", "vllm.logger", name, parameters, lambda original: original)
    with pytest.raises(RuntimeError, match=rf"vllm\.logger\.{name} {message}"):
        patch.apply()


def test_modeling_and_training_do_not_import_vllm() -> None:
    code = (
        "import sys, vllm_loopus.modeling.model, vllm_loopus.recast.cut, vllm_loopus.training.run\n"
        "import vllm_loopus.trace.tracing, vllm_loopus.trace.page, vllm_loopus.trace.workload\n"
        "sys.exit(any(m == 'vllm' or m.startswith('vllm.') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
