"""Reads the sample text of the analysis as sequences of token ids."""

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import torch

BUILT_IN = "built-in"
TEXT_FIELDS = ("text", "content", "prompt", "question")
MIN_TOKENS = 16
CHARACTERS = 2**16  # number that is read and tokenised at a time


def texts(source: str, field: str | None = None) -> Iterator[str]:
    """Iterates over the documents of `source`.

    `source`: `built-in`, a text file (read in pieces), a JSONL file, or a data set, given as
    `name:config:split` (`wikitext:wikitext-2-raw-v1:train`). `field`: the field with the text in
    JSONL files and data sets. Raises `ValueError` if the source cannot be read.
    """
    if source == BUILT_IN:
        yield resources.files("vllm_loopus.recast").joinpath("sample.txt").read_text()
        return
    path = Path(source).expanduser()
    if path.is_file():
        try:
            if path.suffix in (".jsonl", ".json", ".ndjson"):
                with path.open() as lines:
                    for number, line in enumerate(lines, 1):
                        if line.strip():
                            yield _text_of(json.loads(line), field, f"{path}, line {number}")
            else:
                with path.open() as stream:
                    while piece := stream.read(CHARACTERS):
                        yield piece + stream.readline(CHARACTERS)  # to the end of its last line
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"sample={source!r} cannot be read: {error}") from error
        return
    for number, row in enumerate(_dataset(source), 1):
        yield _text_of(row, field, f"{source}, row {number}")


def _dataset(source: str) -> Iterator[Any]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"sample={source!r} is not a file; to read it as a data set, "
            "pip install 'vllm-loopus[train]'"
        ) from error
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        yield from load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # `datasets` raises many types
        raise ValueError(
            f"sample={source!r} is neither a file nor a data set that can be read: {error}"
        ) from error


def _text_of(row: Any, field: str | None, where: str) -> str:
    if isinstance(row, str):
        return row
    fields = (field,) if field else TEXT_FIELDS
    for name in fields:
        if isinstance(row, dict) and isinstance(row.get(name), str):
            return str(row[name])
    raise ValueError(f"{where} has no text in the field {' or '.join(fields)}; give --text-field")


def sequences(
    documents: Iterable[str], tokenizer: Any, length: int, num_tokens: int
) -> Iterator[torch.Tensor]:
    """Concatenates the documents and cuts their first `num_tokens` token ids into sequences.

    Sequences have `length` tokens; the last one may be shorter. Raises `ValueError` if there are
    fewer than 16 tokens.
    """
    budget = islice(_token_ids(documents, tokenizer), num_tokens)
    found = 0
    while len(sequence := list(islice(budget, length))) > 1:
        found += len(sequence)
        yield torch.tensor(sequence)
    if found < MIN_TOKENS:
        raise ValueError(f"the sample has {found} tokens; at least {MIN_TOKENS} are needed")


def _token_ids(documents: Iterable[str], tokenizer: Any) -> Iterator[int]:
    for text in documents:
        for start in range(0, len(text), CHARACTERS):
            piece = text[start : start + CHARACTERS]
            try:  # verbose: a document may be longer than the model's context
                tokens = tokenizer(piece, add_special_tokens=start == 0, verbose=False)["input_ids"]
            except Exception as error:  # tokenizers raise many types
                raise ValueError(f"the sample cannot be tokenised: {error}") from error
            yield from tokens
