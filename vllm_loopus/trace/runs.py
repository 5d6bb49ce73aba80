"""Saved runs: answers with exit depths, in the shapes that servers, batches and scripts write.

A line is an object; what is looked for in it, in this order:

- an answer of the OpenAI server, alone or under `response` (`body` inside it in a batch's output
  file): each of its `choices` (completions, chat, the last chunk of a choice in a stream), or the
  answer itself (responses);
- a line of a script: `exit_depths` with `token_ids`, `tokens` (texts) or `text`, or `outputs` of
  them;
- a file of `vllm-loopus trace --json`, whole or a trace a line.

Lines of a stream may begin with `data: `; chunks without exit depths are passed over.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_loopus.config import MAX_RECURSION_DEPTH
from vllm_loopus.trace.record import FORMAT, VERSION
from vllm_loopus.trace.tokens import UNKNOWN, Vocabulary, token_class

LABELS = ("difficulty", "label")
ENVELOPES = ("response", "body", "result")
PARTS = ("choices", "outputs")


@dataclass(frozen=True)
class Answered:
    """Exit depths of an answer's tokens, their classes, and the label of its line."""

    exit_depths: list[int]
    classes: list[str]
    label: str | None


def read(file: Path, vocabulary: Vocabulary | None = None, by: str | None = None) -> list[Answered]:
    """The answers of a run. `by` names the label's field, `a.b` for one inside another.

    Raises `ValueError` naming the line for what cannot be read, and when no answer has depths.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"run={str(file)!r} cannot be read: {error}") from error
    answers: list[Answered] = []
    for where, row in _rows(text):
        try:
            answers += _answers(row, vocabulary, by)
        except ValueError as error:
            raise ValueError(f"{file}, {where}: {error}") from error
    if not answers:
        raise ValueError(
            f"{file} holds no exit depths; ask the server with vllm_xargs "
            '{"return_exit_depths": 1}, or write vllm_loopus.exit_depths(output) offline'
        )
    if by is not None and all(answer.label is None for answer in answers):
        raise ValueError(f"by={by!r}: no line of {file} has that field")
    return answers


def _rows(text: str) -> Iterator[tuple[str, Any]]:
    """The objects of a file: its lines, or all of it where it is one object."""
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        whole = None
    if whole is not None:
        rows = whole if isinstance(whole, list) else [whole]
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))
        return
    # Not splitlines(): texts may hold line separators of other kinds.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip().removeprefix("data: ")
        if not line or line == "[DONE]" or line.startswith(("event: ", ":")):
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error


def _answers(row: Any, vocabulary: Vocabulary | None, by: str | None) -> Iterator[Answered]:
    if not isinstance(row, Mapping):
        raise ValueError("must be a JSON object")
    if row.get("format") == FORMAT:
        if row.get("version") != VERSION:
            raise ValueError(f"version={row.get('version')!r} of a trace is not {VERSION}")
        for trace in _objects(row.get("traces"), "traces"):
            if not isinstance(trace.get("fields"), Mapping) or "exit_depths" not in trace:
                raise ValueError("a trace needs exit_depths and fields; is the file whole?")
            yield _answered(trace, _label({**trace, **trace["fields"]}, by), vocabulary)
        return
    label = _label(row, by)
    answer: Any = row
    while "exit_depths" not in answer and not any(name in answer for name in PARTS):
        inner = next(
            (answer[name] for name in ENVELOPES if isinstance(answer.get(name), Mapping)), None
        )
        if inner is None:
            return
        answer = inner
        label = _label(answer, by) if label is None else label
    named = next((name for name in PARTS if name in answer), None)
    for part in [answer] if named is None else _objects(answer[named], named):
        if part.get("exit_depths") is not None:
            yield _answered(part, label, vocabulary)


def _objects(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        raise ValueError(f"{name} must be a list of JSON objects")
    return value


def _label(row: Mapping[str, Any], by: str | None) -> str | None:
    if by is None:
        return next((str(row[name]) for name in LABELS if row.get(name) is not None), None)
    value: Any = row
    for part in by.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else str(value)


def _answered(
    part: Mapping[str, Any], label: str | None, vocabulary: Vocabulary | None
) -> Answered:
    depths = part["exit_depths"]
    most = MAX_RECURSION_DEPTH
    if not isinstance(depths, list) or not all(type(d) is int and 1 <= d <= most for d in depths):
        raise ValueError(f"exit_depths must be a list of whole numbers from 1 to {most}")
    classes = _classes(part, len(depths), vocabulary)
    if classes is not None and len(classes) != len(depths):
        raise ValueError(f"has {len(depths)} exit depths, but {len(classes)} tokens")
    return Answered(depths, classes or [UNKNOWN] * len(depths), label)


def _classes(
    part: Mapping[str, Any], num_tokens: int, vocabulary: Vocabulary | None
) -> list[str] | None:
    """The class of each token by the first of these that the answer has; None where none is known.

    Texts of tokens (of a trace, `tokens`, or log-probabilities); ids, with a vocabulary; the whole
    text, where the tokenizer makes as many tokens of it, end-of-text aside.
    """
    tokens = part.get("tokens")
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        return [token_class(token) for token in tokens]
    if isinstance(tokens, list) and all("token_class" in token for token in tokens):
        return [str(token["token_class"]) for token in tokens]
    logprobs = part.get("logprobs")
    ids = part.get("token_ids")
    if vocabulary is not None and isinstance(ids, list):
        return [vocabulary.token_class(i) for i in vocabulary.checked(ids, "token_ids")]
    if isinstance(logprobs, Mapping):
        texts = logprobs.get("tokens") or [
            token.get("token") for token in logprobs.get("content") or []
        ]
        if len(texts) == num_tokens:
            return [_of_logprobs(text, vocabulary) for text in texts]
    text = part.get("text") or (part.get("message") or {}).get("content")
    if vocabulary is not None and isinstance(text, str) and text:
        classes = [vocabulary.token_class(i) for i in vocabulary.encode(text, special=False)]
        if len(classes) == num_tokens - 1 and _ended(part):
            classes.append("special")
        return classes if len(classes) == num_tokens else None
    return None


def _ended(part: Mapping[str, Any]) -> bool:
    """Whether the last token of an answer may be its end-of-text, which its text does not show."""
    return part.get("finish_reason") in (None, "stop") and part.get("stop_reason") is None


def _of_logprobs(text: Any, vocabulary: Vocabulary | None) -> str:
    """`return_tokens_as_token_ids` makes `token_id:17` of a token."""
    if not isinstance(text, str):
        return UNKNOWN
    if text.startswith("token_id:") and text[9:].isdigit():
        return UNKNOWN if vocabulary is None else vocabulary.token_class(int(text[9:]))
    return token_class(text)
