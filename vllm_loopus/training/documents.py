"""Converts rows of a data set to documents: token ids, and which of them are targets."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_loopus.training.objective import IGNORED

ROLE = "assistant"


class DataError(ValueError):
    """A row or a source cannot be used; the message names it and the fix."""


@dataclass(frozen=True)
class Segment:
    """A piece of a document's text, tokenised separately, and whether it is a target."""

    text: str
    target: bool


@dataclass(frozen=True)
class Draft:
    """A document before tokenisation. `splits`: whether it may be split into several documents."""

    segments: tuple[Segment, ...]
    begins: bool  # whether it starts with the special tokens of the tokenizer
    ends: bool  # whether it ends with the end token, as a target
    splits: bool = False


@dataclass(frozen=True)
class Documents:
    """Makes documents with a tokenizer.

    A row has one of three forms: text (all tokens are targets), `messages` (the turns of the
    assistant are targets), or `prompt` and `completion` (the completion is the target). The end
    token is appended to texts and completions.
    """

    tokenizer: Any
    max_length: int

    def of(self, rows: Sequence[tuple[str, str, Any]]) -> list[dict[str, list[int]]]:
        """Documents of at most `max_length` tokens, with `input_ids` and `labels` each.

        `rows`: for each row its place (for errors), the key of its text, and the row itself. Long
        texts are split, other long documents are truncated, and documents without a target are left
        out. Raises `DataError` for a row of another form.
        """
        drafts = [draft for where, key, row in rows for draft in self._drafts(where, key, row)]
        texts = [segment.text for draft in drafts for segment in draft.segments]
        encoded = iter(
            self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            if texts
            else ()
        )
        begin = [i for i in self.tokenizer("")["input_ids"] if i != self.tokenizer.eos_token_id]
        documents: list[dict[str, list[int]]] = []
        for draft in drafts:
            ids: list[int] = []
            labels: list[int] = []
            if draft.begins:
                ids += begin
                labels += [IGNORED] * len(begin)
            for segment in draft.segments:
                piece = next(encoded)
                ids += piece
                labels += piece if segment.target else [IGNORED] * len(piece)
            if draft.ends and self.tokenizer.eos_token_id is not None:
                ids.append(self.tokenizer.eos_token_id)
                labels.append(self.tokenizer.eos_token_id)
            documents += self._pieces(ids, labels, draft.splits)
        return documents

    def _pieces(
        self, ids: list[int], labels: list[int], splits: bool
    ) -> Iterator[dict[str, list[int]]]:
        end = len(ids) if splits else min(len(ids), self.max_length)
        for start in range(0, end, self.max_length):
            part = slice(start, min(start + self.max_length, end))
            # The first token of a document is never a target.
            if any(label != IGNORED for label in labels[part][1:]):
                yield {"input_ids": ids[part], "labels": labels[part]}

    def _drafts(self, where: str, key: str, row: Any) -> Iterator[Draft]:
        if (problem := problem_of(row, key)) is not None:
            raise DataError(f"{where} {problem}")
        if isinstance(row.get(key), str):
            yield Draft((Segment(row[key], True),), begins=True, ends=True, splits=True)
        elif row.get("messages") is not None:
            yield from self._chat(where, row["messages"])
        else:
            segments = (Segment(row["prompt"], False), Segment(row["completion"], True))
            yield Draft(segments, begins=True, ends=True)

    def _chat(self, where: str, messages: Any) -> Iterator[Draft]:
        turns = [i for i, message in enumerate(messages) if message["role"] == ROLE]
        spans = [self._turn(where, messages, turn) for turn in turns]
        whole = self._render(where, messages)
        if all(whole.startswith(text) for _, text in spans):
            segments = []
            done = 0
            for start, text in spans:
                segments.append(Segment(whole[done:start], False))
                segments.append(Segment(text[start:], True))
                done = len(text)
            yield Draft(tuple(segments), begins=False, ends=False)
            return
        # The template renders earlier turns differently (for example without their thinking), so
        # each turn becomes a document with the text that it would be generated from.
        for start, text in spans:
            segments = [Segment(text[:start], False), Segment(text[start:], True)]
            yield Draft(tuple(segments), begins=False, ends=False)

    def _turn(self, where: str, messages: Any, turn: int) -> tuple[int, str]:
        """The text of the chat up to the end of a turn, and where the answer starts in it."""
        before = self._render(where, messages[:turn], add_generation_prompt=True)
        text = self._render(where, messages[: turn + 1]).rstrip()
        if not text.startswith(before):
            raise DataError(
                f"{where}: the chat template renders turn {turn} differently once it is answered, "
                "so the answer cannot be separated from the rest; use another template, or rows of "
                "prompt and completion"
            )
        return len(before), text

    def _render(self, where: str, messages: Any, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise many types
            raise DataError(f"{where}: the chat template cannot render it: {error}") from error


def problem_of(row: Any, key: str) -> str | None:
    """Why nothing can be learnt from a row whose text has this key; None if it can."""
    if not isinstance(row, Mapping):
        return f"is {json.dumps(row)[:40]}, not an object with {key!r}"
    if isinstance(row.get(key), str):
        return None
    if row.get("messages") is not None:
        return _problem_of_chat(row["messages"])
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return None
    if row.get(key) is not None:
        return f"has {row[key]!r:.40} in {key!r}, which is not text"
    found = ", ".join(str(name) for name in row if row[name] is not None) or "nothing"
    return f"has neither text in {key!r}, nor messages, nor prompt and completion (it has {found})"


def _problem_of_chat(messages: Any) -> str | None:
    if not isinstance(messages, list) or not all(map(_is_turn, messages)):
        return "has messages that are not a list of objects with role and content"
    turns = [i for i, message in enumerate(messages) if message["role"] == ROLE]
    if not turns:
        return f"has messages with no turn of the {ROLE}, so nothing to learn"
    for turn in turns:
        if messages[turn].get("content") is None and not messages[turn].get("tool_calls"):
            return f"has no content to learn in turn {turn + 1}, of the {ROLE}"
    return None


def _is_turn(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)
