"""`vllm-loopus trace` as a user calls it. Nothing here depends on what loopus-tiny has learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import GOLDEN
from vllm_loopus.cli.main import app
from vllm_loopus.trace.exits import exits_of, rule_of

TINY = "loopus-tiny"


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit) and result.stdout == ""
    return " ".join(result.stderr.split())


def test_everything_at_once(tmp_path: Path) -> None:
    files = {
        option: tmp_path / name
        for option, name in (
            ("--json", "trace.json"),
            ("--html", "trace.html"),
            ("--trajectories", "states.png"),
            ("--convergence", "convergence.png"),
        )
    }
    options = [value for pair in files.items() for value in pair]
    knobs = ("--max-loops", "4", "--min-loops", "2", "--exit-threshold", "0.52", "--top", "3")
    result = run("trace", TINY, "--chat", "--prompt", "(3+4)=", "--max-tokens", "3", *knobs,
                 "--tokens", "0", *options)  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "trace.json").read_text())
    assert (data["format"], data["version"], data["model"]) == ("vllm-loopus trace", 1, TINY)
    assert data["halting"]["max_loops"] == 4 and data["halting"]["min_loops"] == 2
    (trace,) = data["traces"]
    assert trace["prompt"] == "(3+4)=" and not trace["given"]
    assert len(trace["prompt_token_ids"]) == len("(3+4)=") + 3  # the template's marks
    assert 1 <= len(trace["tokens"]) <= 3
    assert trace["trajectories"]["tokens"] == [0]
    found = exits_of(trace, rule_of(data))
    for token, depth, reason in zip(trace["tokens"], found.depths, found.reasons, strict=True):
        assert (token["exit_depth"], token["left_by"]) == (depth, reason) and depth >= 2
        assert [d["depth"] for d in token["depths"]] == [1, 2, 3, 4]
        assert all(len(d["top"]) == 3 for d in token["depths"])
        assert token["depths"][depth - 1]["top"][0]["token_id"] == token["token_id"]
    for word in ("token", "depth", "predicts", "gate", "exit by", "mean exit depth"):
        assert word in result.stdout
    assert (tmp_path / "trace.html").read_text().startswith("<!doctype html>")
    for picture in ("states.png", "convergence.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    again = run("depths", tmp_path / "trace.json", "--json")
    assert json.loads(again.stdout)["overall"]["tokens"] == len(trace["tokens"])


def test_a_given_answer() -> None:
    result = run("trace", TINY, "--prompt", "(1", "--answer", "+2)=3", "--json", "-")
    data = json.loads(result.stdout)
    (trace,) = data["traces"]
    assert trace["text"] == "+2)=3" and trace["given"]
    assert [token["text"] for token in trace["tokens"]] == list("+2)=3")
    assert [token["position"] for token in trace["tokens"]] == [1, 2, 3, 4, 5]
    assert [token["token_class"] for token in trace["tokens"]] == [
        "punctuation", "digit", "punctuation", "punctuation", "digit"
    ]  # fmt: skip


def test_files_of_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "(1+2)=", "answer": "3", "difficulty": 1},
        {"prompt_token_ids": [6, 7], "answer_token_ids": [8, 9], "difficulty": 2},
    ]
    lines.write_text("\n".join(map(json.dumps, rows)))
    run_file = tmp_path / "trace.json"
    result = run("trace", TINY, "--prompts", lines, "--answers", "--json", run_file)
    assert result.exit_code == 0, result.output
    data = json.loads(run_file.read_text())
    assert [trace["fields"] for trace in data["traces"]] == [{"difficulty": 1}, {"difficulty": 2}]
    assert data["traces"][1]["token_ids"] == [8, 9]
    assert data["convergence"]["num_tokens"] == 3
    assert "means over 3 tokens" in result.stdout and "exit by" not in result.stdout
    told = json.loads(run("depths", run_file, "--json").stdout)
    assert [row["group"] for row in told["groups"]["label"]] == ["1", "2"]
    text = tmp_path / "prompts.txt"
    text.write_text("(1+2)=\n\n(3*4)=\n")
    result = run("trace", TINY, "--prompts", text, "--max-tokens", "1", "--json", "-")
    data = json.loads(result.stdout)
    assert [trace["prompt"] for trace in data["traces"]] == ["(1+2)=", "(3*4)="]


def test_a_terminal_is_not_moved_by_a_model(hostile: Path, tmp_path: Path) -> None:
    """Tokens that are markup for rich or control a terminal are shown as they are."""
    answer = list(range(130, 142))
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt_token_ids": [40], "answer_token_ids": answer}))
    result = run("trace", hostile, "--prompts", file, "--answers", "--html", tmp_path / "t.html")
    assert result.exit_code == 0, result.output
    assert "\x1b[2J" not in result.stdout and "[red]x[/]" in result.stdout
    text = (tmp_path / "t.html").read_text()
    assert text.count("</script>") == 3 and "<img" not in text


def test_without_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt_token_ids": [5, 6, 7]}))
    traced = ("trace", GOLDEN / "llama", "--prompts", file, "--max-tokens", "2")
    with_alias = run(*traced, "--tokenizer", TINY)
    assert with_alias.exit_code == 0, with_alias.output
    result = run(*traced)
    assert result.exit_code == 0, result.output
    assert "0: #" in result.stdout or "#" in result.stdout
    told = refused("trace", GOLDEN / "llama", "--prompt", "x")
    assert "has no tokenizer for prompt='x'; give --tokenizer, or token ids" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --prompt TEXT and --prompts FILE"),
        (("--prompt", "a", "--prompts", "f"), "give one of --prompt TEXT and --prompts FILE"),
        (("--prompt", ""), "prompt='' has no tokens"),
        (("--prompt", "a", "--answer", ""), "answer='' has no tokens"),
        (("--prompt", "a", "--html", "-"), "--html needs a file"),
        (("--prompts", "f", "--answer", "a"), "--answer needs --prompt"),
        (("--prompt", "a", "--answers"), "--answers needs --prompts"),
        (("--prompt", "a", "--answer", "b", "--check"), "omit --engine vllm and --check"),
        (("--prompts", "gone.txt"), "prompts='gone.txt' cannot be read"),
        (("--prompt", "a" * 600), "are 632 tokens, but the model's context is 512"),
        (("--prompt", "a", "--max-tokens", "512"), "max_tokens=512 (512) are 513 tokens"),
        (("--prompt", "a", "--max-loops", "0"), "max_loops=0 must be from 1"),
        (("--prompt", "a", "--max-loops", "2", "--min-loops", "3"), "min_loops=3 must be from 1"),
        (("--prompt", "a", "--exit-threshold", "-1"), "exit_threshold=-1.0 must be 0 or more"),
        (("--prompt", "a", "--exit-threshold", "nan"), "must be a finite number"),
        (("--prompt", "a", "--exit-interval", "0"), "exit_interval=0 must be 1 or more"),
        (("--prompt", "a", "--tokenizer", "/nowhere"), "tokenizer='/nowhere' cannot be loaded"),
        (("--prompt", "a", "--device", "abacus"), "device='abacus' cannot be used"),
        (("--prompt", "a", "--tokens", "7..9", "--max-tokens", "2"), "7..9 is not within 0.."),
        (("--prompts", "f", "--tokens", "0"), "--tokens needs --prompt"),
        (("--prompt", "a", "--html", "/nowhere/a.html"), "/nowhere/a.html cannot be written"),
        (("--prompt", "a", "--trajectories", "a.txt"), "a.txt is not a picture"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    assert message in refused("trace", TINY, *options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompt"),
        ("{", "line 1: is not JSON"),
        ("[]", "line 1: must be an object"),
        ('{"prompt": "a"}\n{"x": 1}', "line 2: has neither `prompt` nor `prompt_token_ids`"),
        ('{"prompt": 7}', "prompt=7 must be a string"),
        ('{"prompt": ""}', "prompt='' has no tokens"),
        ('{"prompt_token_ids": []}', "prompt_token_ids has no tokens"),
        ('{"prompt_token_ids": [999]}', "prompt_token_ids contains token 999, but"),
        ('{"prompt_token_ids": [-1]}', "prompt_token_ids contains token -1, but"),
        ('{"prompt_token_ids": [true]}', "contains True, which is not a token id"),
        ('{"prompt_token_ids": 7}', "prompt_token_ids must be a list"),
    ],
)
def test_bad_files_of_prompts(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    assert message in refused("trace", TINY, "--prompts", file)


def test_lines_without_the_answer(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}')
    told = refused("trace", TINY, "--prompts", file, "--answers")
    assert "has neither `answer` nor `answer_token_ids`" in told


def test_models_that_cannot_be_traced(tmp_path: Path) -> None:
    assert "is not a known alias" in refused("trace", "loopus-tini", "--prompt", "a")
    told = refused("trace", "loopus-tiny-base", "--prompt", "a")
    assert "is a qwen3 model, not a LoopUS model" in told
    (tmp_path / "config.json").write_text((GOLDEN / "qwen3" / "config.json").read_text())
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt_token_ids": [1]}')
    told = refused("trace", tmp_path, "--prompts", file)
    assert str(tmp_path) in told and "safetensors" in told  # no weights


def test_a_model_without_a_chat_template(hostile: Path) -> None:
    told = refused("trace", hostile, "--prompt", "a", "--chat")
    assert "has no chat template; omit --chat" in told
