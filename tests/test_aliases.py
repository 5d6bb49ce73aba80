"""Aliases: what they resolve to, who wins, and what an unknown one says."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_loopus import aliases
from vllm_loopus.cli.main import app

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(aliases.REDIRECT_VARIABLE, raising=False)
    monkeypatch.delenv(aliases.CONFIGURED_VARIABLE, raising=False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "recast"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def redirects() -> dict[str, str]:
    aliases.install_redirects()
    return json.loads(Path(os.environ[aliases.REDIRECT_VARIABLE]).read_text())


def test_embedded_and_published() -> None:
    table = redirects()
    assert Path(table["loopus-tiny"], "config.json").is_file()
    assert table["loopus-qwen3-8b"] == aliases.PUBLISHED["loopus-qwen3-8b"]
    assert "loopus-qwen3-4b" not in table


def test_the_users_own_wins(checkpoint: Path) -> None:
    for name in ("loopus-qwen3-8b", "loopus-qwen3-4b", "loopus-tiny"):
        assert run(app, ["alias", "add", name, str(checkpoint)]).exit_code == 0
        assert redirects()[name] == str(checkpoint)
    listed = json.loads(run(app, ["alias", "list", "--json"]).stdout)
    assert {row["name"] for row in listed if row["from"] == "you"} == {
        "loopus-qwen3-8b",
        "loopus-qwen3-4b",
        "loopus-tiny",
    }
    assert run(app, ["alias", "remove", "loopus-tiny"]).exit_code == 0
    assert redirects()["loopus-tiny"] == str(aliases.EMBEDDED["loopus-tiny"])


@pytest.mark.parametrize("form", ["json", "lines"])
def test_a_configured_redirect_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    file = tmp_path / "mine"
    mine = {"loopus-tiny": "/elsewhere", "other": "/model"}
    lines = "\n".join(f"{name} {to}" for name, to in mine.items())
    file.write_text(json.dumps(mine) if form == "json" else lines)
    monkeypatch.setenv(aliases.REDIRECT_VARIABLE, str(file))
    for _ in range(2):  # a child process inherits the variable and does it again
        table = redirects()
        assert table["loopus-tiny"] == "/elsewhere"
        assert table["other"] == "/model"
        assert "loopus-phi-4" in table


@pytest.mark.parametrize(
    "how", ["other contents", "a file of others", "a folder of a group", "a link", "no folder"]
)
def test_a_table_that_others_could_have_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    expected = redirects()
    file = Path(os.environ[aliases.REDIRECT_VARIABLE])
    assert file.parent == tmp_path / "cache" / "vllm-loopus"
    assert file.stat().st_mode & 0o777 == 0o600
    if how == "other contents":
        file.write_text('{"loopus-tiny": "/elsewhere"}')
    elif how == "a file of others":
        file.chmod(0o666)
    elif how == "a folder of a group":
        file.parent.chmod(0o770)
    elif how == "a link":
        file.rename(tmp_path / "elsewhere.json")
        file.symlink_to(tmp_path / "elsewhere.json")
        file.parent.chmod(0o500)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
        monkeypatch.delenv(aliases.REDIRECT_VARIABLE)
    assert redirects() == expected
    used = Path(os.environ[aliases.REDIRECT_VARIABLE])
    assert not used.is_symlink() and used.stat().st_mode & 0o077 == 0
    assert not used.parent.stat().st_mode & 0o022
    before = used
    assert redirects() == expected  # as in a child process, which inherits the variable
    assert Path(os.environ[aliases.REDIRECT_VARIABLE]) == before


def test_a_path_means_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loopus-tiny").mkdir()
    assert "loopus-tiny" not in redirects()
    aliases.explain_unknown_alias("loopus-tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loopus-qwen3-40b", "is not a known alias"),
        ("ouro-7b", "is not a known alias"),
        ("loopus-qwen3-4b", "recast Qwen/Qwen3-4B"),
    ],
)
@pytest.mark.parametrize("offline", [True, False])
def test_unknown_alias_through_vllm(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str, offline: bool
) -> None:
    import huggingface_hub
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)

    with pytest.raises(ValueError, match=message) as caught:
        EngineArgs(model=name).create_engine_config()
    assert f"vllm-loopus alias add {name} PATH" in str(caught.value)
    assert "loopus-tiny ->" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "a/b", "."], "name='a/b'"),
        (["add", "my-model", "./nowhere"], "target='./nowhere'"),
        (["remove", "loopus-tiny"], "name='loopus-tiny' is not one of your aliases"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = run(app, ["alias", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_damaged_registry_is_told(checkpoint: Path) -> None:
    aliases.registry_file().parent.mkdir(parents=True)
    aliases.registry_file().write_text("{")
    result = run(app, ["alias", "add", "mine", str(checkpoint)])
    assert result.exit_code == 2
    assert "aliases.json cannot be read" in result.stderr
    assert aliases.registry_file().read_text() == "{"
