"""Catalogue, diffs, run-time patches and the installed vLLM agree; with its diff a patch goes."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from tests.serving import overlay, upstream
from vllm_loopus.plugin import register
from vllm_loopus.serving.hooks.patches import MARK, PATCHES, Patch

CATALOGUE = tomllib.loads((overlay.PATCHES / "catalogue.toml").read_text())
DIFFS = overlay.diffs()
ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "docs" / "upstream"
pinned = pytest.mark.skipif(
    upstream.version() != list(upstream.recorded())[-1],
    reason="the diffs are against the pinned vLLM, the newest of the range",
)


def test_catalogue_is_what_is_applied() -> None:
    assert CATALOGUE.keys() == {patch.key for patch in PATCHES}
    for patch in PATCHES:
        entry = CATALOGUE[patch.key]
        assert entry["target"] == f"{patch.module}.{patch.name}"
        assert entry.keys() == {
            "target", "diff", "why", "loses", "upstream", "proposal", "remove_when"
        }  # fmt: skip
        assert all(text.strip() for text in entry.values())
        assert (overlay.PATCHES / entry["proposal"]).is_file()
    assert {entry["diff"] for entry in CATALOGUE.values()} == {diff.name for diff in DIFFS}
    proposals = {(overlay.PATCHES / entry["proposal"]).resolve() for entry in CATALOGUE.values()}
    pages = {page for page in UPSTREAM.glob("*.md") if page.name != "README.md"}
    reports = {page for page in pages if page.read_text().startswith("# [Bug]")}
    assert pages - reports == proposals
    index = (UPSTREAM / "README.md").read_text()
    assert all(f"]({page.name})" in index for page in pages)


def test_no_more_is_replaced_than_has_to_be() -> None:
    assert len(PATCHES) <= 7


@pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)
def test_diffs_are_commits(diff: Path) -> None:
    head, _, rest = diff.read_text().partition("\n---\n")
    assert head.startswith("From 0000000") and "\nSubject: [PATCH] [" in head
    assert all(name in rest.partition("\ndiff --git")[0] for name in ("changed", "+"))


@pinned
@pytest.mark.parametrize("diff", DIFFS, ids=lambda path: path.stem)
def test_diffs_apply_to_the_installed_vllm(diff: Path, tmp_path: Path) -> None:
    overlay.copy_touched(diff, tmp_path)
    overlay.apply(diff, tmp_path, "--check")


STATE = """
import json, os, sys
import torch, transformers  # once for all
for folder in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        continue
    sys.path.insert(0, folder)
    import logging, vllm
    assert vllm.__file__.startswith(folder)
    told = []
    logger = logging.getLogger("vllm.loopus")
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    from vllm_loopus.serving.hooks.patches import PATCHES, apply_patches
    apply_patches()
    print("STATE", json.dumps(told), flush=True)
    os._exit(0)
"""


@pinned
@pytest.mark.engine
def test_a_patch_is_not_applied_where_its_diff_is(tmp_path: Path) -> None:
    """It, and no other: one half of the diffs is applied, then the other half."""
    applied = [DIFFS[::2], DIFFS[1::2]]
    folders = [
        overlay.build(tmp_path / str(number), some) / "" for number, some in enumerate(applied)
    ]
    result = subprocess.run(
        [sys.executable, "-c", STATE, *map(str, folders)],
        env={**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("STATE ")]
    assert len(lines) == len(applied), result.stderr[-3000:]
    for some, line in zip(applied, lines, strict=True):
        told = json.loads(line.removeprefix("STATE "))
        not_applied = {text.split()[1] for text in told if "not applied" in text}
        names = {diff.name for diff in some}
        assert not_applied == {key for key, entry in CATALOGUE.items() if entry["diff"] in names}


WITH_ALL_DIFFS = (
    "tests/serving/test_golden.py::test_alone_and_in_one_batch[qwen3-8]",
    "tests/serving/test_kv_layout.py",
)


@pinned
@pytest.mark.engine
def test_answers_are_right_with_all_diffs(tmp_path: Path) -> None:
    """Our tests of these hold with vLLM's hooks in place of our patches."""
    folder = overlay.build(tmp_path, DIFFS)
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *WITH_ALL_DIFFS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


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
    [
        ("gone_function", (), "is gone"),
        ("init_logger", ("a", "b"), "takes"),
        ("init_logger", ("a", "..."), "takes"),
    ],
)
def test_a_changed_vllm_is_noticed(name: str, parameters: tuple, message: str) -> None:
    patch = Patch("x", "vllm.logger", name, parameters, lambda original: original, lambda: False)
    with pytest.raises(RuntimeError, match=rf"vllm\.logger\.{name} {message}"):
        patch.apply()
