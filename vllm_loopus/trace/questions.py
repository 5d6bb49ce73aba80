"""Reads the prompts to trace, and their answers if they are given."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_loopus.trace.tokens import Vocabulary

JSON_LINES = (".jsonl", ".ndjson", ".json")
OWN_FIELDS = ("prompt", "prompt_token_ids", "answer", "answer_token_ids")


@dataclass(frozen=True)
class Question:
    """A prompt, and its answer if that is given and not generated."""

    prompt: str | None
    prompt_ids: list[int]
    answer: list[int] | None = None
    fields: dict[str, Any] = field(default_factory=dict)  # other fields of its line


def from_text(
    vocabulary: Vocabulary,
    prompt: str,
    answer: str | None = None,
    chat: bool = False,
    **fields: Any,
) -> Question:
    """A question from a prompt. Raises `ValueError` for a prompt or answer without tokens."""
    ids = vocabulary.chat(prompt) if chat else vocabulary.encode(prompt)
    given = None if answer is None else _answer(vocabulary, answer)
    return Question(prompt, ids, given, fields)


def from_file(
    vocabulary: Vocabulary, file: Path, chat: bool = False, given: bool = False
) -> list[Question]:
    """The questions in a file: the lines of a text file, or JSON lines with `prompt` or
    `prompt_token_ids`.

    `given`: trace the `answer` or `answer_token_ids` of each line instead of a generated answer.
    Raises `ValueError` that names the line.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts={str(file)!r} cannot be read: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            if file.suffix in JSON_LINES:
                questions.append(_from_line(vocabulary, line, chat, given))
            elif given:
                raise ValueError("text files cannot have answers; give JSON lines with `answer`")
            else:
                questions.append(from_text(vocabulary, line, chat=chat))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    if not questions:
        raise ValueError(f"prompts={str(file)!r} has no prompt; write one on each line")
    return questions


def check_lengths(questions: Iterable[Question], max_tokens: int, context: int) -> None:
    """Raises `ValueError` if a prompt and its answer exceed the model's context."""
    for question in questions:
        prompt = len(question.prompt_ids)
        answer = max_tokens if question.answer is None else len(question.answer)
        if prompt + answer > context:
            what = f"max_tokens={max_tokens}" if question.answer is None else "the answer"
            raise ValueError(
                f"a prompt of {prompt} tokens and {what} ({answer}) are {prompt + answer} tokens, "
                f"but the model's context is {context} tokens; shorten one of them"
            )


def _from_line(vocabulary: Vocabulary, line: str, chat: bool, given: bool) -> Question:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("must be an object with `prompt` or `prompt_token_ids`")
    fields = {name: value for name, value in row.items() if name not in OWN_FIELDS}
    answer = None
    if given:
        answer = _given(vocabulary, row)
    ids, prompt = row.get("prompt_token_ids"), row.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r} must be a string")
    if ids is not None:
        if not isinstance(ids, list):
            raise ValueError("prompt_token_ids must be a list of token ids")
        return Question(prompt, vocabulary.checked(ids, "prompt_token_ids"), answer, fields)
    if prompt is None:
        raise ValueError("has neither `prompt` nor `prompt_token_ids`")
    encoded = vocabulary.chat(prompt) if chat else vocabulary.encode(prompt)
    return Question(prompt, encoded, answer, fields)


def _given(vocabulary: Vocabulary, row: dict[str, Any]) -> list[int]:
    ids, text = row.get("answer_token_ids"), row.get("answer")
    if isinstance(ids, list):
        return vocabulary.checked(ids, "answer_token_ids")
    if isinstance(text, str):
        return _answer(vocabulary, text)
    raise ValueError("has neither `answer` nor `answer_token_ids`")


def _answer(vocabulary: Vocabulary, text: str) -> list[int]:
    """Encodes an answer without a beginning-of-text token, because it continues the prompt."""
    try:
        return vocabulary.encode(text, special=False)
    except ValueError as error:
        raise ValueError(str(error).replace("prompt=", "answer=", 1)) from error
