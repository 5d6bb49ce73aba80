"""Reads saved runs: answers with exit depths, in the formats of servers, batches and scripts.

Each line is a JSON object in one of these formats:

- an answer of the OpenAI server, alone or in `response` (and there in `body` in the output of a
  batch): each of its `choices` (completions, chat, the last event of a choice in a stream), or the
  answer itself (Responses API);
- a line of a script: `exit_depths` with `token_ids`, `tokens` (texts) or `text`, or a list of these
  in `outputs`;
- the output of `vllm-loopus trace --json`, as one file or one trace per line.

Lines of a stream may start with `data: `; events without exit depths are ignored.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_loopus.loop_fields import MAX_RECURSION_DEPTH
from vllm_loopus.trace.record import FORMAT, VERSION
from vllm_loopus.trace.tokens import UNKNOWN, Vocabulary, token_class

LABELS = ("difficulty", "label")
ENVELOPES = ("response", "body", "result")
PARTS = ("choices", "outputs")


@dataclass(frozen=True)
class Answered:
    """The exit depths and classes of an answer's tokens, and the label of its line."""

    exit_depths: list[int]
    classes: list[str]
    label: str | None


def read(file: Path, vocabulary: Vocabulary | None = None, by: str | None = None) -> list[Answered]:
    """The answers of a run. `by`: the field with the label, `a.b` for a nested one.

    Raises `ValueError` that names the line if it cannot be read, or if no answer has exit depths.
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
            f"{file} has no exit depths; send requests with vllm_xargs "
            '{"return_exit_depths": 1}, or save vllm_loopus.exit_depths(output) offline'
        )
    if by is not None and all(answer.label is None for answer in answers):
        raise ValueError(f"by={by!r}: no line of {file} has this field")
    return answers


def _rows(text: str) -> Iterator[tuple[str, Any]]:
    """The objects of a file: its lines, or the entries of a single JSON value."""
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        whole = None
    if whole is not None:
        rows = whole if isinstance(whole, list) else [whole]
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))
        return
    # Not splitlines(): texts may contain other line separators.
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
            raise ValueError(
                f"version={row.get('version')!r} of a trace is not supported, only {VERSION}"
            )
        for trace in _objects(row.get("traces"), "traces"):
            if not isinstance(trace.get("fields"), Mapping) or "exit_depths" not in trace:
                raise ValueError("a trace needs exit_depths and fields; check that it is complete")
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
        raise ValueError(
            f"has {len(depths)} exit depths, but {len(classes)} tokens; check --model and the line"
        )
    return Answered(depths, classes or [UNKNOWN] * len(depths), label)


def _classes(
    part: Mapping[str, Any], num_tokens: int, vocabulary: Vocabulary | None
) -> list[str] | None:
    """The class of each token, from the first of these that the answer has; None without any.

    Texts of tokens (of a trace or in `tokens`); ids, with a vocabulary; texts in log-probabilities;
    the whole text, if the tokenizer splits it into as many tokens (without an end token).
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
    """Whether the last token of an answer may be an end token, which is not part of its text."""
    return part.get("finish_reason") in (None, "stop") and part.get("stop_reason") is None


def _of_logprobs(text: Any, vocabulary: Vocabulary | None) -> str:
    """The class of a token in log-probabilities, which may be written as `token_id:17`."""
    if not isinstance(text, str):
        return UNKNOWN
    if text.startswith("token_id:") and text[9:].isdigit():
        return UNKNOWN if vocabulary is None else vocabulary.token_class(int(text[9:]))
    return token_class(text)
