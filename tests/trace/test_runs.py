"""Saved runs in every shape they come in, and their statistics."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.cli.main import app
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.trace.reference import load_vocabulary
from vllm_loopus.trace.runs import Answered, read
from vllm_loopus.trace.tokens import Vocabulary
from vllm_loopus.trace.workload import bucket, statistics

TINY = str(EMBEDDED["loopus-tiny"])
DEPTHS = [3, 1]
CLASSES = ["digit", "special"]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary(TINY, LoopUSConfig.from_pretrained(TINY), None)


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ids(vocabulary: Vocabulary) -> list[int]:
    return vocabulary.encode("7<|end|>")


COMPLETION = {
    "object": "text_completion",
    "choices": [{"index": 0, "text": "7", "exit_depths": DEPTHS, "mean_exit_depth": 2.0}],
}
CHAT = {
    "object": "chat.completion",
    "choices": [{"message": {"role": "assistant", "content": "7"}, "exit_depths": DEPTHS}],
}
RESPONSE = {"object": "response", "output": [], "exit_depths": DEPTHS}
LOGPROBS = {"tokens": ["7", "<|end|>"], "token_logprobs": [0, 0]}
CHAT_LOGPROBS = {"content": [{"token": "7"}, {"token": "<|end|>"}]}
# Lines, and the classes without and with a vocabulary.
SHAPES: dict[str, tuple[Any, list[str] | None, list[str] | None]] = {
    "completion": (COMPLETION, None, CLASSES),
    "chat": (CHAT, None, CLASSES),
    "response": (RESPONSE, None, None),
    "batch output": (
        {"custom_id": "1", "response": {"status_code": 200, "body": CHAT}},
        None,
        CLASSES,
    ),
    "own envelope": ({"prompt": "3+4", "response": COMPLETION}, None, CLASSES),
    "stream's end": ({"type": "response.completed", "response": RESPONSE}, None, None),
    "logprobs": ({"choices": [{"logprobs": LOGPROBS, "exit_depths": DEPTHS}]}, CLASSES, CLASSES),
    "chat logprobs": (
        {"choices": [{"logprobs": CHAT_LOGPROBS, "exit_depths": DEPTHS}]},
        CLASSES,
        CLASSES,
    ),
    "offline tokens": ({"tokens": ["7", "<|end|>"], "exit_depths": DEPTHS}, CLASSES, CLASSES),
    "offline text": ({"text": "7", "exit_depths": DEPTHS}, None, CLASSES),
    "cut off": (
        {"choices": [{"text": "7", "finish_reason": "length", "exit_depths": DEPTHS}]},
        None,
        None,
    ),
    "stop string": (
        {
            "choices": [
                {"text": "7", "finish_reason": "stop", "stop_reason": "x", "exit_depths": DEPTHS}
            ]
        },
        None,
        None,
    ),
    "whole text": ({"text": "77", "exit_depths": DEPTHS}, None, ["digit", "digit"]),
    "other text": ({"text": "12345", "exit_depths": DEPTHS}, None, None),
    "outputs": ({"outputs": [{"text": "7", "exit_depths": DEPTHS}]}, None, CLASSES),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path: Path, vocabulary: Vocabulary, shape: str) -> None:
    line, without, with_vocabulary = SHAPES[shape]
    file = tmp_path / "run.jsonl"
    file.write_text(json.dumps(line) + "\n\n" + json.dumps({**line, "difficulty": 4}) + "\n")
    for known, classes in ((None, without), (vocabulary, with_vocabulary)):
        expected = classes or ["unknown", "unknown"]
        assert read(file, known) == [
            Answered(DEPTHS, expected, None),
            Answered(DEPTHS, expected, "4"),
        ]


def test_token_ids(tmp_path: Path, vocabulary: Vocabulary) -> None:
    named = [f"token_id:{i}" for i in ids(vocabulary)]
    lines = [
        {"token_ids": ids(vocabulary), "exit_depths": DEPTHS},
        {"choices": [{"token_ids": ids(vocabulary), "text": "7", "exit_depths": DEPTHS}]},
        {"choices": [{"logprobs": {"tokens": named}, "exit_depths": DEPTHS}]},
    ]
    file = tmp_path / "run.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert [answer.classes for answer in read(file, vocabulary)] == [CLASSES] * 3
    assert [answer.classes for answer in read(file)] == [["unknown", "unknown"]] * 3


def test_a_saved_stream(tmp_path: Path) -> None:
    last = {"choices": [{"delta": {}, "finish_reason": "stop", "exit_depths": DEPTHS}]}
    first = {"choices": [{"delta": {"content": "7"}, "finish_reason": None}]}
    file = tmp_path / "stream.txt"
    events = [f"data: {json.dumps(event)}\n" for event in (first, last)]
    file.write_text("\n".join([": ping", "event: x", *events, "data: [DONE]"]))
    assert read(file) == [Answered(DEPTHS, ["unknown"] * 2, None)]


def test_labels(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    rows = [
        {"exit_depths": [1], "label": "easy", "meta": {"k": 2}},
        {"exit_depths": [2], "difficulty": 3},
        {"exit_depths": [3]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [answer.label for answer in read(file)] == ["easy", "3", None]
    assert [answer.label for answer in read(file, by="meta.k")] == ["2", None, None]
    with pytest.raises(ValueError, match=r"by='meta\.x': no line"):
        read(file, by="meta.x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no exit depths; send requests with vllm_xargs"),
        ("", "has no exit depths"),
        ('{"exit_depths": [1]}\n{', "line 2 is not JSON"),
        ('{"exit_depths": [1]}\n[1]', "line 2: must be a JSON object"),
        ('{"exit_depths": [0]}', "entry 1: exit_depths must be a list of whole numbers"),
        ('{"exit_depths": [true]}', "exit_depths must be a list of whole numbers"),
        ('{"exit_depths": [1e30]}', "exit_depths must be a list of whole numbers"),
        ('{"exit_depths": [1000000000000]}', "from 1 to 256"),
        ('{"choices": 3}', "entry 1: choices must be a list of JSON objects"),
        ('{"format": "vllm-loopus trace", "version": 1}', "traces must be a list"),
        ('{"format": "vllm-loopus trace", "version": 1, "traces": [{}]}', "needs exit_depths and"),
        ('{"exit_depths": 3}', "exit_depths must be a list of whole numbers"),
        ('{"exit_depths": [1], "tokens": ["a", "b"]}', "has 1 exit depths, but 2 tokens"),
        ('{"exit_depths": []}', "the run has no tokens"),
        ('{"format": "vllm-loopus trace", "version": 9}', "version=9 of a trace is not supported"),
        ("\udc80", "cannot be read"),
    ],
)
def test_runs_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    result = run("depths", file)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr


def test_statistics() -> None:
    answers = [
        Answered([1, 2, 3, 4], ["digit", "digit", "letter", "special"], "10"),
        Answered([3] * 20, ["letter"] * 20, "9"),
        Answered([2], ["digit"], None),
    ]
    found = statistics(answers)
    assert found["answers"] == 3
    assert found["overall"]["tokens"] == 25
    assert found["overall"]["by_depth"] == {"1": 1, "2": 2, "3": 21, "4": 1}
    assert found["overall"]["mean"] == 2.88
    groups = {name: {row["group"]: row for row in rows} for name, rows in found["groups"].items()}
    assert list(groups["position"]) == [*map(str, range(1, 9)), "9-16", "17-32"]
    assert groups["position"]["1"]["by_depth"] == {"1": 1, "2": 1, "3": 1, "4": 0}
    assert groups["position"]["17-32"]["tokens"] == 4
    assert list(groups["token class"]) == ["letter", "digit", "special"]
    digits = groups["token class"]["digit"]
    assert digits["mean"] == pytest.approx(5 / 3, abs=1e-4)
    assert digits["standard_error"] == pytest.approx(1 / 3, abs=1e-4)
    assert digits["quantiles"] == {"0.1": 1.2, "0.5": 2.0, "0.9": 2.0}
    assert groups["token class"]["special"]["standard_error"] is None
    assert list(groups["label"]) == ["9", "10"]  # numbers by size


def test_positions() -> None:
    assert [bucket(p) for p in (1, 8, 9, 16, 17, 32, 33, 1024)] == [
        "1", "8", "9-16", "9-16", "17-32", "17-32", "33-64", "513-1024"
    ]  # fmt: skip


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    lines = [{**COMPLETION, "difficulty": k} for k in (1, 2)]
    file.write_text("\n".join(map(json.dumps, lines)))
    result = run("depths", file, "--model", "loopus-tiny", "--png", tmp_path / "depths.png")
    assert result.exit_code == 0, result.output
    for word in ("position", "token class", "label", "digit", "special"):
        assert word in result.stdout
    assert (tmp_path / "depths.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(run("depths", file, "--json", "--by", "choices").stdout)
    assert told["overall"]["mean"] == 2.0 and len(told["groups"]["label"]) == 1
    told = run("depths", file)
    assert "4 of 4 tokens have no known text; give --model" in told.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokenizer", "x"), "--tokenizer needs --model"),
        (("--model", "loopus-tini"), "is not a known alias"),
        (("--by", "nothing"), "no line of"),
        (("--png", "a.txt"), "a.txt is not a picture"),
        (("--png", "/nowhere/a.png"), "cannot be written"),
    ],
)
def test_bad_options(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(json.dumps(COMPLETION))
    result = run("depths", file, *options)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert "cannot be read" in run("depths", tmp_path / "gone.jsonl").stderr
