"""Documents of every form, rows of several documents, and models that keep them apart."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.training.conftest import LENGTH, document, random_loopus
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.tiny.tokenizer import build_tokenizer
from vllm_loopus.training.documents import DataError, Documents
from vllm_loopus.training.packing import collate, pack
from vllm_loopus.training.settings import Data
from vllm_loopus.training.stream import PackedStream, evaluation_sequences

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+3"},
    {"role": "assistant", "content": "five"},
]


def shown(documents: list[dict[str, list[int]]], tokenizer: Any) -> list[str]:
    """Documents as text, with their targets in brackets."""
    told = []
    for found in documents:
        text, open_ = "", False
        for token, label in zip(found["input_ids"], found["labels"], strict=True):
            assert label in (-100, token)
            if (label != -100) != open_:
                text += "[" if not open_ else "]"
                open_ = not open_
            text += tokenizer.decode(token)
        told.append(text + ("]" if open_ else ""))
    return told


def documents_of(row: Any, max_length: int = 99, **changes: Any) -> list[str]:
    tokenizer = build_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    made = Documents(tokenizer, max_length).of([("a row", "text", row)])
    return shown(made, tokenizer)


def test_text_prompts_and_chats() -> None:
    assert documents_of({"text": "abc"}) == ["[abc<|end|>]"]
    empty = {"text": None, "messages": None}  # columns of other rows of a mixed file
    assert documents_of({**empty, "prompt": "1+1=", "completion": "2"}) == ["1+1=[2<|end|>]"]
    assert documents_of({"messages": CHAT}) == [
        "<|system|>be brief<|end|><|user|>1+1<|end|><|assistant|>[2<|end|>]"
        "<|user|>2+3<|end|><|assistant|>[five<|end|>]"
    ]


def test_a_template_that_forgets() -> None:
    """Earlier answers are rendered without their thinking: every turn is a document then."""
    template = (
        "{% for m in messages %}{{ '<' + m.role[0] + '>' }}"
        "{% if m.role == 'assistant' and loop.last %}(thinks){% endif %}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    assert documents_of({"messages": CHAT[1:]}, chat_template=template) == [
        "<u>1+1\n<a>[(thinks)2]",
        "<u>1+1\n<a>2\n<u>2+3\n<a>[(thinks)five]",
    ]


def test_what_is_too_long() -> None:
    assert documents_of({"text": "abcdefg"}, 4) == ["[abcd]", "[efg<|end|>]"]
    assert documents_of({"text": "abcd"}, 4) == ["[abcd]"]  # the end alone has no token before it
    assert documents_of({"prompt": "12", "completion": "345"}, 4) == ["12[34]"]
    assert documents_of({"prompt": "12345", "completion": "6"}, 4) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "abc"}, "a row has neither text in 'text', nor messages.*it has txt"),
        ({"messages": CHAT[:2]}, "a row has messages with no turn of the assistant"),
        (
            {"messages": "hello"},
            "a row has messages that are not a list of objects with role and content",
        ),
        ({"messages": [{"content": "a"}]}, "a row has messages that are not a list of objects"),
        (
            {"messages": [*CHAT[:2], {"role": "assistant", "content": None}]},
            "a row has no content to learn in turn 3, of the assistant",
        ),
        ({"prompt": "a", "completion": None}, "it has prompt"),
    ],
)
def test_refused_rows(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        documents_of(row)
    broken = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"a row: the chat template cannot .*must alternate"):
        documents_of({"messages": CHAT}, chat_template=broken)
    answers_first = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="renders turn 2 differently once it is answered"):
        documents_of({"messages": CHAT}, chat_template=answers_first)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=40))
def test_pack(lengths: list[int]) -> None:
    documents = [document(seed, length) for seed, length in enumerate(lengths)]
    rows = pack(documents, 16)
    sizes = [sum(len(d["input_ids"]) for d in row) for row in rows]
    assert max(sizes) <= 16
    assert sorted(map(str, documents)) == sorted(str(d) for row in rows for d in row)
    # Best fit: two rows could not be one.
    assert all(a + b > 16 for i, a in enumerate(sizes) for b in sizes[:i])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_in_a_row_do_not_see_each_other(attention: str, folders: dict[str, Path]) -> None:
    """Logits of every document in a pack equal its logits alone: the looped and a plain model."""
    rows = [[document(1, 9), document(2, 11)], [document(3, 5), document(4, 6), document(5, 7)]]
    batch = collate(rows, LENGTH, 0)
    assert batch["lengths"].tolist() == [20, 18]
    looped = random_loopus(exit_threshold=1.0).eval()
    looped.set_attn_implementation(attention)
    plain = AutoModelForCausalLM.from_pretrained(folders["plain"], attn_implementation=attention)
    assert looped.config.base._attn_implementation == attention
    # With a cache, transformers keeps nothing apart.
    for model in (partial(LoopUSForCausalLM.forward, looped), partial(plain, use_cache=False)):
        with torch.no_grad():
            packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            for index, row in enumerate(rows):
                start = 0
                for one in row:
                    ids = torch.tensor([one["input_ids"]])
                    alone = model(input_ids=ids).logits[0]
                    found = packed[index, start : start + ids.shape[1]]
                    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
                    start += ids.shape[1]
        # And they would differ if they did.
        seen = model(input_ids=batch["input_ids"][:1]).logits[0, 9:20]
        assert (seen - packed[0, 9:20]).abs().max() > 1e-3


def make_stream(sources: list[dict[str, Any]], seed: int = 3, **fields: Any) -> PackedStream:
    data = Data.model_validate({"max_length": LENGTH, "sources": sources, **fields})
    return PackedStream(data, Documents(build_tokenizer(), LENGTH), seed)


@pytest.mark.parametrize("kind", ["local", "mixed", "streamed"])
def test_a_stream_goes_on_where_it_stood(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """From any position, a new stream gives the rows that the first one gives."""
    sources: list[dict[str, Any]] = [{"path": str(folders["rows.jsonl"])}]
    if kind == "mixed":
        sources.append({"path": str(folders["held_out.jsonl"]), "weight": 0.3})
    elif kind == "streamed":
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text(folders["rows.jsonl"].read_text())
        sources = [{"dataset": str(tmp_path / "set")}]
    options = {"shuffle_documents": 35}
    stream = make_stream(sources, **options)
    iterator = iter(stream)
    rows = [next(iterator) for _ in range(140)]  # several epochs
    assert rows[:40] != rows[40:80]
    for at in (0, 1, 17, 60, 101):
        other = make_stream(sources, **options)
        other.restore(json.loads(json.dumps(stream.position(at))))
        again = iter(other)
        assert [next(again) for _ in range(30)] == rows[at : at + 30]
        # And once more from there, as after a second interruption.
        third = make_stream(sources, **options)
        third.restore(other.position(20))
        assert next(iter(third)) == rows[at + 20]
    if kind == "local":
        assert [next(iter(make_stream(sources, seed=4, **options)))] != rows[:1]


def test_an_epoch_has_every_row_once(folders: dict[str, Path]) -> None:
    """Also where it ends inside a window; and the next one in another order."""
    stream = make_stream([{"path": str(folders["rows.jsonl"])}], shuffle_documents=40)
    windows = [stream._window(np.random.default_rng(i)) for i in range(6)]
    epochs = [
        sorted(str(d) for rows in windows[i : i + 3] for row in rows for d in row) for i in (0, 3)
    ]
    assert epochs[0] == epochs[1] and len(epochs[0]) == 90
    assert windows[0] != windows[3]


def test_weights(folders: dict[str, Path]) -> None:
    stream = make_stream(
        [
            {"path": str(folders["rows.jsonl"]), "weight": 3},
            {"path": str(folders["held_out.jsonl"])},
        ],
        shuffle_documents=400,
    )
    next(iter(stream))
    first, second = (source.epoch * len(source.rows) + source.taken for source in stream.sources)
    assert first + second == 400
    assert abs(first / 400 - 0.75) < 0.11  # 5 sigma


def test_sources_that_cannot_be(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"path='nowhere.jsonl' is not a file"):
        make_stream([{"path": "nowhere.jsonl"}])
    (tmp_path / "bad.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl, line 1 has neither text"):
        make_stream([{"path": str(tmp_path / "bad.jsonl")}])
    for number, (content, message) in enumerate(
        [
            (b"{no json\n", ", line 1 is not JSON"),
            (b"", "' has no rows"),
            (b'{"text": "\xff"}\n', ", line 1 is not UTF-8"),
            (b'{"text": "a"}\n\n{"text": "b"}\n{"text": "c"\n', ", line 4 is not JSON"),
            (b'{"text": "a"}\n{"text": 7}\n', ", line 2 has 7 in 'text', which is not text"),
            (b'{"text": "a"}\n[1]\n', r", line 2 is \[1\], not an object"),
            (b'{"messages": [{"role": "user"}]}\n', ", line 1 has messages with no turn of the"),
            (b'{"messages": [{"role": "assistant"}]}\n', ", line 1 has no content to learn"),
        ]
    ):
        file = tmp_path / f"broken-{number}.jsonl"
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"{file.name}{message}"):
            make_stream([{"path": str(file)}])
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"prompt": "1" * LENGTH, "completion": "2"}) + "\n"
    )
    with pytest.raises(DataError, match=r"nothing to learn .*raise data.max_length"):
        next(iter(make_stream([{"path": str(tmp_path / "long.jsonl")}])))


def test_evaluation_rows(folders: dict[str, Path]) -> None:
    source = {"path": str(folders["held_out.jsonl"])}
    data = Data.model_validate(
        {"max_length": LENGTH, "sources": [source], "eval": [source], "eval_documents": 7}
    )
    rows = evaluation_sequences(data, Documents(build_tokenizer(), LENGTH))
    assert sum(len(row) for row in rows) == 7
    more = evaluation_sequences(
        data.model_copy(update={"eval_documents": 99}), Documents(build_tokenizer(), LENGTH)
    )
    assert sum(len(row) for row in more) == 12
