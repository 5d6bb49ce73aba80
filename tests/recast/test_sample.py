"""Where the text of an analysis comes from."""

import json
from pathlib import Path

import pytest

from vllm_loopus.recast.sample import CHARACTERS, sequences, texts
from vllm_loopus.tiny.tokenizer import build_tokenizer


def test_built_in_is_plain_text_of_some_length() -> None:
    (text,) = texts("built-in")
    assert len(text) > 4000 and text.isascii()


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    assert list(texts(str(tmp_path / "a.txt"))) == ["one\ntwo"]
    rows = [{"text": "one"}, {"content": "two"}, "three"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(texts(str(tmp_path / "a.jsonl"))) == ["one", "two", "three"]
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "x", "text": "y"}))
    assert list(texts(str(tmp_path / "b.jsonl"), "body")) == ["x"]


def test_data_set(tmp_path: Path) -> None:
    """`datasets` reads a folder of JSONL as it reads a name on the hub."""
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "three"}\n')
    assert list(texts(str(tmp_path))) == ["one", "two"]
    assert list(texts(f"{tmp_path}::test")) == ["three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"te', "a.jsonl' cannot be read"),
        (b'{"body": "a"}', "line 1 has no text in the field text or content"),
        (b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(texts(str(tmp_path / "a.jsonl")))


def test_no_such_source() -> None:
    with pytest.raises(ValueError, match="is neither a file nor a data set that can be read"):
        list(texts("no-such-text.txt"))


def test_sequences() -> None:
    tokenizer = build_tokenizer()
    found = list(sequences(["abcdefghij", "klmnopqrst"], tokenizer, length=8, num_tokens=19))
    assert [len(ids) for ids in found] == [8, 8, 3]
    assert "".join(tokenizer.decode(ids) for ids in found) == "abcdefghijklmnopqrs"
    with pytest.raises(ValueError, match="has 3 tokens; at least 16 are needed"):
        list(sequences(["abc"], tokenizer, length=8, num_tokens=100))


def test_long_texts_are_read_in_pieces(tmp_path: Path) -> None:
    text = "the quick brown fox\n" * 20_000 + "x" * 300_000
    (tmp_path / "a.txt").write_text(text)
    pieces = list(texts(str(tmp_path / "a.txt")))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * CHARACTERS
    sizes: list[int] = []

    def tokenizer(piece: str, **_: object) -> dict[str, list[int]]:
        sizes.append(len(piece))
        return {"input_ids": [1] * len(piece)}

    list(sequences([text], tokenizer, length=512, num_tokens=2048))
    assert sizes == [CHARACTERS]  # of a document of 700 thousand characters


def test_text_that_cannot_be_tokenised() -> None:
    with pytest.raises(ValueError, match="cannot be tokenised"):
        list(sequences(["\ud800" * 30], build_tokenizer(), length=8, num_tokens=64))


def test_documents_are_read_as_they_are_needed() -> None:
    read: list[int] = []

    def documents() -> object:
        for number in range(1000):
            read.append(number)
            yield "abcdefgh"

    assert len(list(sequences(documents(), build_tokenizer(), length=8, num_tokens=32))) == 4
    assert len(read) <= 5
