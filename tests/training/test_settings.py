"""The file of a run: strict keys, checked values, overrides, and every recipe we ship."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vllm_loopus.cli.main import app
from vllm_loopus.cli.output import INTERRUPTED
from vllm_loopus.training.settings import (
    Data,
    Optimizer,
    Recursion,
    Served,
    Settings,
    SettingsError,
    Source,
    Supervision,
    read_settings,
    settings_from,
)

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_read(file: Path) -> None:
    found = read_settings(file)
    assert found.tokens > found.optimizer.warmup_tokens
    assert settings_from(found.model_dump(mode="json")) == found


def test_there_are_recipes() -> None:
    names = {file.stem for file in CONFIGS.glob("*.yaml")}
    assert names >= {"qwen3-1.7b", "qwen3-4b", "qwen3-8b", "phi-4", "tinyllama", "loopus-tiny"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "modle: unknown key; did you mean 'model'?"),
        ({"supervision": {"n_supervison": 2}}, "supervision.n_supervison: .*'n_supervision'"),
        ({"data": {"sorces": []}}, "data.sources is missing; data.sorces: .*mean 'sources'"),
        ({"data": {"sources": [{"path": "a.jsonl", "wieght": 1}]}}, "0.wieght: .*'weight'"),
        ({"optimizer": {"zzz": 1}}, "optimizer.zzz: unknown key; known keys: learning_rate"),
        ({"tokens": 0}, "tokens=0: .*greater than or equal to 1"),
        ({"tokens": "many"}, "tokens='many': .*integer"),
        ({"batch_size": True}, "batch_size: true is a boolean"),
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size=3 does not divide"),
        ({"supervision": {"n_supervision": 9, "n_reasoning_steps": 8}}, "n_supervision=9 steps"),
        ({"supervision": {"confidence_input": "both"}}, "confidence_input='both': .*'state'"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate=nan"),
        ({"optimizer": {"warmup_tokens": 2000}}, "warmup_tokens=2000 must be below tokens=2000"),
        ({"data": {"sources": []}}, "data.sources"),
        ({"data": {"sources": [{}]}}, "exactly one of path"),
        ({"data": {"sources": [{"path": "a.csv"}]}}, "'a.csv' must end in .jsonl"),
        ({"objective": "loop"}, "objective='loop'"),
        ({"served": {"max_loops": 0}}, "served.max_loops=0"),
    ],
)
def test_wrong_settings(
    changes: dict[str, Any], message: str, content: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(SettingsError, match=message):
        settings_from(content(**changes))


def test_overrides(content: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(content()))
    overrides = [
        "tokens=1.5e9",
        "optimizer.warmup_tokens=2e3",
        "supervision.beta=0.5",
        "served.max_loops=4",
    ]
    found = read_settings(file, overrides)
    assert (found.tokens, found.supervision.beta, found.served.max_loops) == (1_500_000_000, 0.5, 4)
    assert found.optimizer.warmup_tokens == 2000
    found = read_settings(file, ["mixed_precision=no", "output=~/run"])  # `no` is false in YAML
    assert (found.mixed_precision, found.output) == ("no", Path.home() / "run")
    for wrong, message in (
        ("tokens", "is not key=value"),
        ("supervision.bta=1", "did you mean 'beta'"),
        ("tokens.x=1", "tokens has no keys"),
        ("seed=[", "the value is not YAML"),
    ):
        with pytest.raises(SettingsError, match=message):
            read_settings(file, [wrong])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "has no keys"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        (None, "cannot be"),
    ],
)
def test_no_settings_at_all(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_settings(file)


def test_every_key_is_in_the_reference() -> None:
    """`docs/training-keys.md` has a row for each key, in its section, with its default."""
    text = (Path(__file__).parents[2] / "docs" / "training-keys.md").read_text()
    parts = dict(
        zip(
            re.findall(r"^## (.+)$", text, re.M), re.split(r"^## .+$", text, flags=re.M)[1:],
            strict=True,
        )
    )  # fmt: skip
    sections = {
        "Top level": Settings, "`supervision`": Supervision, "`recursion`": Recursion,
        "`data`": Data,
        "`data.sources[]`": Source, "`optimizer`": Optimizer, "`served`": Served,
    }  # fmt: skip
    assert parts.keys() == sections.keys()
    for title, section in sections.items():
        rows = dict(re.findall(r"^\| `(\w+)` \| .+? \| (.+?) \| .+ \|$", parts[title], re.M))
        fields = {
            name: field
            for name, field in section.model_fields.items()
            if f"`{name}`" not in sections
        }
        assert rows.keys() == fields.keys(), title
        for name, field in fields.items():
            if not field.is_required() and field.default not in (None, ()):
                assert rows[name].strip("`").lower() == str(field.default).lower(), name


@pytest.mark.parametrize(
    ("checkpoint", "told"),
    [
        ("checkpoint-4", "the last complete checkpoint is out/checkpoint-4. Continue from it"),
        (None, "interrupted before the first checkpoint; remove out"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    checkpoint: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_loopus.training import run

    def interrupted(*_: object) -> None:
        raise run.InterruptedRunError(
            Path("out"), None if checkpoint is None else Path("out") / checkpoint
        )

    monkeypatch.setattr(run, "train", interrupted)
    result = CliRunner().invoke(app, ["train", str(CONFIGS / "smollm2.yaml")])
    assert result.exit_code == INTERRUPTED
    assert told in " ".join(result.stderr.split())
