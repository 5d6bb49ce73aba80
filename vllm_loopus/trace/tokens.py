"""Token ids, their texts, and the token classes used by statistics."""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

CLASSES = ("letter", "digit", "punctuation", "whitespace", "mixed", "special", "unknown")
UNKNOWN = "unknown"
SPECIAL_LOOKS = re.compile(r"<\|[^|]*\|>|</?[a-zA-Z_]+>|\[[A-Z]+\]")
MARKS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def token_class(text: str | None, special: bool | None = None) -> str:
    """The class of a token, one of `CLASSES`. Surrounding blanks are ignored.

    - `special`: by the tokenizer; if that is not known (None), an empty text, `<|...|>` or `<...>`.
    - `whitespace`: only blanks. `digit`: only digits, of any script. `letter`: letters with their
      marks. `punctuation`: punctuation and symbols. `mixed`: anything else, including parts of
      characters. `unknown`: the text is not known.
    """
    if special:
        return "special"
    if text is None:
        return UNKNOWN
    if special is None and (not text or SPECIAL_LOOKS.fullmatch(text)):
        return "special"
    stripped = text.strip()
    if not stripped:
        return "whitespace"
    kinds = {unicodedata.category(character)[0] for character in stripped}
    if "\ufffd" in stripped:
        return "mixed"
    if "L" in kinds and kinds <= {"L", "M"}:
        return "letter"
    for letter, name in (("N", "digit"), ("P", "punctuation"), ("S", "punctuation")):
        if letter in kinds and kinds <= ({"N"} if name == "digit" else {"P", "S"}):
            return name
    return "mixed"


def visible(text: str) -> str:
    """A text for display, with visible blanks at its ends, line ends and control characters.

    The result cannot move the cursor of a terminal or change the direction of writing.
    """
    inner = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    text = "·" * start + inner + "·" * (len(text) - start - len(inner))
    shown = []
    for character in text:
        if character != " " and character in MARKS:
            shown.append(MARKS[character])
        elif unicodedata.category(character) in UNPRINTABLE:
            shown.append(f"\\u{{{ord(character):x}}}")
        else:
            shown.append(character)
    return "".join(shown) or "∅"


TOKENS_OF_A_CHARACTER = 8  # at most; an emoji has four bytes, joined ones more


@cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import

    return {character: byte for byte, character in bytes_to_unicode().items()}


def bytes_shown(piece: str) -> str:
    """A token of byte-level BPE that is not text: ` <0xF0 0x9F>`. Other pieces are unchanged."""
    alphabet = _byte_alphabet()
    if not all(character in alphabet for character in piece):
        return piece
    text = ""
    raw = bytes(alphabet[character] for character in piece)
    while raw and raw[0] < 128:
        text, raw = text + chr(raw[0]), raw[1:]
    return f"{text}<{' '.join(f'0x{byte:02X}' for byte in raw)}>" if raw else text


class Vocabulary:
    """A model's vocabulary, with or without a tokenizer. Without one, it only knows token ids.

    `size`: the model's number of tokens. `name`: the model's name in errors.
    """

    def __init__(self, tokenizer: Any, size: int, name: str) -> None:
        self.tokenizer, self.size, self.name = tokenizer, size, name
        self._special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
        self._texts: dict[int, str] = {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The token ids of a text. Raises `ValueError` without a tokenizer."""
        ids = self._tokenizer_for(text)(text, add_special_tokens=special, verbose=False)
        return self.checked(list(ids["input_ids"]), f"prompt={_shortened(text)}")

    def chat(self, text: str) -> list[int]:
        """The token ids of a user message in the chat template, up to the start of the answer.

        Raises `ValueError` without a tokenizer or a chat template.
        """
        tokenizer = self._tokenizer_for(text)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{self.name} has no chat template; omit --chat")
        messages = [{"role": "user", "content": text}]
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        except Exception as error:  # templates raise many types
            raise ValueError(f"the chat template of {self.name} fails: {error}") from error
        return self.checked(list(ids), f"prompt={_shortened(text)}")

    def checked(self, ids: Sequence[int], what: str) -> list[int]:
        """The ids as a list. Raises `ValueError` if there are none, or for invalid ids."""
        if not ids:
            raise ValueError(f"{what} has no tokens; it must not be empty")
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise ValueError(f"{what} contains {token_id!r}, which is not a token id")
            if not 0 <= token_id < self.size:
                raise ValueError(
                    f"{what} contains token {token_id}, but {self.name} has {self.size} tokens; "
                    "use the model's own tokenizer"
                )
        return list(ids)

    def text(self, token_id: int) -> str:
        """The text of one token; `#17` without a tokenizer."""
        if token_id not in self._texts:
            self._texts[token_id] = self._text(token_id)
        return self._texts[token_id]

    def shown(self, ids: Sequence[int]) -> list[str]:
        """The part of each token in the text of a sequence. A character that several tokens make
        together is the first one's, and the others have nothing."""
        parts = [self.text(token_id) for token_id in ids]
        start = 0
        while self.tokenizer is not None and start < len(ids):
            end = start + 1
            if self._is_part(ids[start]):
                for end in range(start + 1, min(start + TOKENS_OF_A_CHARACTER, len(ids)) + 1):
                    text = str(self.tokenizer.decode(ids[start:end]))
                    if "\ufffd" not in text:
                        parts[start:end] = [text, *[""] * (end - start - 1)]
                        break
                else:
                    end = start + 1  # no character comes of it
            start = end
        return parts

    def _is_part(self, token_id: int) -> bool:
        return "\ufffd" in self.tokenizer.decode([token_id])

    def joined(self, ids: Sequence[int]) -> str | None:
        """The text of a sequence without special tokens; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def token_class(self, token_id: int) -> str:
        """The class of a token, one of `CLASSES`."""
        if self.tokenizer is None:
            return UNKNOWN
        return token_class(self.text(token_id), token_id in self._special)

    def _tokenizer_for(self, text: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} has no tokenizer for prompt={_shortened(text)}; give --tokenizer, or "
                "token ids (prompt_token_ids in the file of --prompts)"
            )
        return self.tokenizer

    def _text(self, token_id: int) -> str:
        if self.tokenizer is None:
            return f"#{token_id}"
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an id that the model has but the tokenizer does not
            return f"#{token_id}"
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        if "\ufffd" in text:  # a part of a character
            return bytes_shown(str(piece))
        # SentencePiece drops the blank before a single word.
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else str(text)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
