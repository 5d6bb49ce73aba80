"""Token classes, texts made visible, and vocabularies."""

import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.trace.conftest import tokenizer_of
from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.trace.reference import load_vocabulary
from vllm_loopus.trace.tokens import (
    CLASSES,
    Vocabulary,
    bytes_shown,
    token_class,
    visible,
)

TINY = str(EMBEDDED["loopus-tiny"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "letter"),
        ("über", "letter"),
        ("e\u0301", "letter"),
        ("数", "letter"),
        ("42", "digit"),
        (" ٣", "digit"),
        ("½", "digit"),
        ("...", "punctuation"),
        (" =", "punctuation"),
        ("€", "punctuation"),
        ("=(", "punctuation"),
        ("<", "punctuation"),
        ("\n\n", "whitespace"),
        ("\t ", "whitespace"),
        ("\u00a0", "whitespace"),
        ("x1", "mixed"),
        ("don't", "mixed"),
        ("1.", "mixed"),
        ("\ufffd", "mixed"),
        ("a\ufffd", "mixed"),
        ("\u0301", "mixed"),
        ("<|im_end|>", "special"),
        ("</s>", "special"),
        ("[PAD]", "special"),
        ("", "special"),
        (None, "unknown"),
    ],
)
def test_classes(text: str | None, expected: str) -> None:
    assert token_class(text) == expected
    assert expected in CLASSES


def test_parts_of_characters_are_bytes() -> None:
    assert bytes_shown("ĠðŁ") == " <0xF0 0x9F>"
    assert bytes_shown("Į") == "<0x8C>"
    assert bytes_shown("ab") == "ab"
    assert bytes_shown("<0xF0>日") == "<0xF0>日"


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    class Bytes:
        """A byte-level tokenizer whose tokens are single bytes."""

        all_special_ids = ()

        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return bytes(ids).decode(errors="replace")

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return str(bytes_to_unicode()[token_id])

    vocabulary = Vocabulary(Bytes(), 256, "bytes")
    ids = list("a 🌧é".encode())
    assert vocabulary.shown(ids) == ["a", " ", "🌧", "", "", "", "é", ""]
    assert vocabulary.text(ids[2]) == "<0xF0>"
    cut = vocabulary.shown(ids[:4])  # the answer ends inside a character
    assert cut == ["a", " ", "<0xF0>", "<0x9F>"]


def test_the_tokenizer_knows_what_is_special() -> None:
    assert token_class("<b>", special=False) == "mixed"
    assert token_class("word", special=True) == "special"
    assert token_class("", special=False) == "whitespace"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "·the"),
        ("a b ", "a b·"),
        ("  ", "··"),
        ("\n\t", "⏎⇥"),
        ("\x1b[2J", "\\u{1b}[2J"),
        ("\u202eabc", "\\u{202e}abc"),
        ("\u2028", "\\u{2028}"),
        ("\ud800", "\\u{d800}"),
        ("", "∅"),
        ("</script>", "</script>"),
    ],
)
def test_visible(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_the_embedded_vocabulary() -> None:
    vocabulary = load_vocabulary(TINY, LoopUSConfig.from_pretrained(TINY), None)
    ids = vocabulary.encode("(3+b)\n <|end|>")
    assert [vocabulary.text(i) for i in ids] == ["(", "3", "+", "b", ")", "\n", " ", "<|end|>"]
    assert [vocabulary.token_class(i) for i in ids] == [
        "punctuation", "digit", "punctuation", "letter", "punctuation", "whitespace", "whitespace",
        "special",
    ]  # fmt: skip
    assert vocabulary.joined(ids) == "(3+b)\n "
    chat = vocabulary.chat("1")
    assert "".join(map(vocabulary.text, chat)) == "<|user|>1<|end|><|assistant|>"
    beyond = vocabulary.size + 5
    assert vocabulary.text(beyond) == f"#{beyond}"


def test_the_bases_tokenizer_where_there_is_no_other(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tokenizer_of(64).save_pretrained(tmp_path / "base")
    config = LoopUSConfig.from_pretrained(TINY)
    config.base_model_name_or_path = str(tmp_path / "base")
    (tmp_path / "model").mkdir()
    found = load_vocabulary(str(tmp_path / "model"), config, None)
    assert found.tokenizer is not None and found.text(40) == "("
    config.base_model_name_or_path = None
    assert load_vocabulary(str(tmp_path / "model"), config, None).tokenizer is None


def test_no_tokenizer() -> None:
    vocabulary = Vocabulary(None, 8, "m")
    assert (vocabulary.text(3), vocabulary.token_class(3)) == ("#3", "unknown")
    assert vocabulary.joined([1, 2]) is None
    for encode in (vocabulary.encode, vocabulary.chat):
        with pytest.raises(
            ValueError, match=r"m has no tokenizer for prompt='x'; give --tokenizer"
        ):
            encode("x")
