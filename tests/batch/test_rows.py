"""Rows of a batch: told apart, checked, and refused with line, field, value and fix."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_loopus.batch.rows import Limits, Row, RowError, read_rows
from vllm_loopus.batch.run import Options, limits_of

OPTIONS = {
    "max_model_len": 64,
    "additional_config": {"loopus": {"reasoning_effort": {"low": 2}}},
}


@pytest.fixture(scope="module")
def limits() -> Limits:
    from vllm_loopus.cli.info import resolve

    return limits_of(Options("loopus-tiny", resolve("loopus-tiny"), OPTIONS))


@pytest.fixture
def rows_of(limits: Limits, tmp_path: Path) -> Callable[..., list[Row]]:
    def read(*rows: Any) -> list[Row]:
        file = tmp_path / "in.jsonl"
        file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        return list(read_rows(file, limits))

    return read


CHAT = [{"role": "user", "content": "3+2*3="}]


def openai(**body: Any) -> dict[str, Any]:
    return {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": CHAT, **body},
    }


def test_three_forms(rows_of: Any) -> None:
    plain, chat, batch = rows_of(
        {"prompt": "3+2*3=", "max_loops": 2, "temperature": 0, "max_tokens": 4, "metadata": [1]},
        "",
        {"messages": CHAT, "reasoning_effort": "low", "max_completion_tokens": 3},
        openai(vllm_xargs={"exit_depths": [1, 2]}, model="loopus-tiny", stop="x"),
    )
    assert (plain.index, plain.prompt, plain.echo["metadata"]) == (0, "3+2*3=", [1])
    wanted = {"temperature": 0, "max_tokens": 4, "extra_args": {"max_loops": 2}}
    assert wanted.items() <= plain.sampling_params.items()
    assert (chat.index, chat.prompt, chat.messages) == (1, None, CHAT)
    assert chat.sampling_params["extra_args"] == {"max_loops": 2}
    assert chat.sampling_params["max_tokens"] == 3
    assert chat.template["add_generation_prompt"] is True
    assert batch.echo["custom_id"] == "a" and batch.sampling_params["stop"] == ["x"]
    assert batch.sampling_params["extra_args"] == {"exit_depths": [1, 2]}


def test_parameters_build_the_same_sampling_params(rows_of: Any) -> None:
    from vllm import SamplingParams

    given = {
        "prompt": [1, 2], "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 7, "min_tokens": 1,
        "max_tokens": 9, "stop": ["a", "bc"], "stop_token_ids": [3], "logit_bias": {"4": 2.0},
        "presence_penalty": 0.1, "ignore_eos": True, "exit_threshold": 0.5,
    }  # fmt: skip
    (row,) = rows_of(given)
    params = SamplingParams(**row.sampling_params)
    for name, value in given.items():
        if name == "logit_bias":
            assert params.logit_bias == {4: 2.0}
        elif name not in ("prompt", "exit_threshold"):
            assert getattr(params, name) == value
    assert params.extra_args == {"exit_threshold": 0.5}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ({}, "must have one of prompt and messages"),
        ({"prompt": "a", "messages": CHAT}, "must have one of prompt and messages"),
        ({"prompt": ""}, "prompt='' must be a string"),
        ({"prompt": ["a", "b"]}, "a row has one prompt"),
        ({"prompt": [1, 10**9]}, "list of token ids from 0 to"),
        ({"prompt": [True]}, "list of token ids from 0 to"),
        ({"messages": []}, "messages=[] must be a list with at least one message"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content has {'type': 'text', 'text': 5}, whose text must be a string",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": 5}]},
            "messages[0].tool_calls=5 must be a list",
        ),
        ({"prompt": "a", "structured_outputs": [1]}, "structured_outputs=[1] must be a JSON"),
        ({"messages": [3]}, "messages[0]=3 must have a role"),
        ({"messages": "hello"}, "messages='hello' must be a list"),
        ({"prompt": "a", "max_loops": 99}, "max_loops=99 must be a whole number from 1 to"),
        ({"prompt": "a", "max_loops": True}, "max_loops=True must be a whole number"),
        ({"prompt": "a", "vllm_xargs": {"max_loop": 2}}, "did you mean max_loops?"),
        ({"prompt": "a", "vllm_xargs": {"max_loops": 1}, "max_loops": 1}, "give it once"),
        ({"prompt": "a", "exit_depths": [1, 1], "max_tokens": 1}, "exit_depths has 2 entries"),
        ({"prompt": "a", "max_token": 2}, "max_token=2 is not a field of a row"),
        ({"prompt": "a", "id": 2}, "call it custom_id"),
        ({"prompt": "a", "custom_id": 2}, "custom_id=2 must be a string"),
        ({"prompt": "a", "n": 2}, "n=2 must be 1 in a batch"),
        ({"prompt": "a", "stream": True}, "stream=True must be false in a batch"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature='hot'"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens=0 must be 1 or more"),
        ({"prompt": "a", "model": "gpt"}, "model='gpt' is not served"),
        ({**openai(), "url": "/v1/embeddings"}, "url='/v1/embeddings' is not supported"),
        ({**openai(), "method": "GET"}, "method='GET' must be POST"),
        ({**openai(), "custom_id": None}, "custom_id=None must be a string"),
        ({**openai(), "body": 3}, "body=3 must be a JSON object"),
        ({**openai(), "body": {}}, "messages=None must be a list with at least one message"),
        ({**openai(), "url": []}, "url=[] is not supported"),
        *(
            ({"messages": CHAT, "chat_template_kwargs": {name: 1}}, f"has {name}=1, which is not")
            for name in ("chat_template", "tokenize", "return_dict")
        ),
        ({"prompt": "a\ud800"}, r"prompt='a\ud800' has '\ud800', half of a surrogate pair"),
        ({"prompt": "a", "custom_id": "\udc00"}, r"custom_id='\udc00' has '\udc00', half of a"),
        ({"prompt": "a", "metadata": {"b": ["", "\ud800"]}}, r"metadata.b[1]='\ud800' has"),
        ({"prompt": "a", "metadata": {"\ud800": 1}}, r"the name '\ud800' has"),
        ({**openai(), "max_loops": 2}, "put it into body"),
        (openai(max_loops=2), "max_loops is not a field of the body; put it into vllm_xargs"),
    ],
)
def test_refused(rows_of: Any, row: Any, told: str) -> None:
    with pytest.raises(RowError) as error:
        rows_of({"prompt": "a"}, row)
    assert ", line 2: " in str(error.value) and told in str(error.value)


def test_an_id_that_comes_twice(rows_of: Any) -> None:
    with pytest.raises(RowError, match=r"line 3: custom_id='a' is also in line 1"):
        rows_of(openai(), {"prompt": "a"}, {"prompt": "b", "custom_id": "a"})


def test_a_whole_surrogate_pair_is_a_character(rows_of: Any) -> None:
    (row,) = rows_of('{"prompt": "a", "custom_id": "\\ud83d\\ude00"}')
    assert row.echo["custom_id"] == "\U0001f600"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"max_model_lem": 3}, ""),
        ({"model": "x"}, "leave it out"),
        ({"served_model_name": "x"}, "leave it out"),
        ({"tensor_parallel_size": "2"}, "='2', which must be a whole number of 1 or more"),
        ({"tensor_parallel_size": None}, "=None, which must be a whole number"),
        ({"tensor_parallel_size": True}, "=True, which must be a whole number"),
        ({"tensor_parallel_size": 0}, "=0, which must be a whole number"),
        ({"data_parallel_size": 2}, "=2, which must be 1; give --replicas"),
        ({"data_parallel_size": None}, "=None, which must be a whole number"),
        ({"pipeline_parallel_size": 2}, "=2, which must be 1; .* give tensor_parallel_size"),
    ],
)
def test_engine_arguments_that_cannot_be(args: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"engine_args.*{next(iter(args))}.*{told}"):
        limits_of(Options("loopus-tiny", "loopus-tiny", args))
