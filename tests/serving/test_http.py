"""Knobs and exit depths over HTTP, with the `openai` client against a real server."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.serving.conftest import EFFORTS, MAX_LOOPS, SERVED
from vllm_loopus import LoopUSConfig
from vllm_loopus.cli.info import resolve
from vllm_loopus.tiny.tokenizer import build_tokenizer
from vllm_loopus.trace.reference import load_vocabulary
from vllm_loopus.trace.runs import read
from vllm_loopus.trace.tokens import UNKNOWN

PROMPTS = ["a:ab,bc,cd,da,ab,bc,cd,db=", "3+2*3-1+2*3*3=", "c:ca,ab,bd,dc,ca,ab", "9-2*3+1"]
UNFINISHED = "a:ab,bc,cd,da,ab,bc,cd,d"  # what is sampled next decides how hard it is
COMPLETION = {"model": SERVED, "prompt": PROMPTS[0], "max_tokens": 12, "temperature": 0}
CHAT = {
    "model": SERVED,
    "messages": [{"role": "user", "content": PROMPTS[0]}],
    "max_tokens": 12,
    "temperature": 0,
}
RESPONSE = {"model": SERVED, "input": PROMPTS[0], "max_output_tokens": 12, "temperature": 0}
ENDPOINTS = {"completions": COMPLETION, "chat/completions": CHAT, "responses": RESPONSE}
DEPTHS = [1, 8, 3, 2, 5, 1, 1, 4, 8, 2, 1, 6]
FORCED = {"exit_depths": DEPTHS, "return_exit_depths": 1}


def with_knobs(knobs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"ignore_eos": True, "vllm_xargs": knobs, **more}


def complete(client: OpenAI, knobs: dict[str, Any], **options: Any) -> Any:
    return client.completions.create(**{**COMPLETION, **options}, extra_body=with_knobs(knobs))


def send(address: str, endpoint: str, body: str | dict[str, Any]) -> tuple[int, Any]:
    """Status and parsed answer; `body` may be JSON that no client would write."""
    data = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/{endpoint}", data.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_depths_of_completions(client: OpenAI) -> None:
    answer = complete(client, FORCED, prompt=PROMPTS[:2])
    for choice in answer.choices:
        assert choice.exit_depths == DEPTHS
        assert choice.mean_exit_depth == 3.5
    knobs = {"return_exit_depths": True, "min_loops": 3, "max_loops": 5, "exit_threshold": 0}
    assert complete(client, knobs).choices[0].exit_depths == [3] * 12


def test_depths_only_on_request(client: OpenAI) -> None:
    for knobs in ({}, {"return_exit_depths": 0}, {"return_exit_depths": False}):
        choice = complete(client, knobs).choices[0]
        assert not hasattr(choice, "exit_depths") and not hasattr(choice, "mean_exit_depth")
        assert choice.model_extra["routed_experts"] is None


def test_depths_of_several_choices(client: OpenAI) -> None:
    """Sampled choices leave at depths of their own; whole and streamed answers agree."""
    going_on = {build_tokenizer().eos_token_id: -100}
    options = {
        **{"prompt": UNFINISHED, "logit_bias": going_on},
        **{"n": 3, "temperature": 1.5, "seed": 4},
    }
    knobs = {"exit_threshold": 0.9, "return_exit_depths": 1}
    whole = complete(client, knobs, **options).choices
    assert len({tuple(choice.exit_depths) for choice in whole}) > 1
    last = {}
    for chunk in complete(client, knobs, stream=True, **options):
        for choice in chunk.choices:
            assert hasattr(choice, "exit_depths") == (choice.finish_reason is not None)
            last[choice.index] = choice
    for choice in whole:
        assert last[choice.index].exit_depths == choice.exit_depths
        assert last[choice.index].mean_exit_depth == choice.mean_exit_depth
        assert choice.mean_exit_depth == round(sum(choice.exit_depths) / 12, 4)


def test_depths_of_chat(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, extra_body=with_knobs(FORCED))
    assert whole.choices[0].exit_depths == DEPTHS
    options = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**options, extra_body=with_knobs(FORCED)))
    assert chunks[-1].usage.completion_tokens == 12
    (finished,) = [c for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert finished.exit_depths == DEPTHS and finished.mean_exit_depth == 3.5
    text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert text == whole.choices[0].message.content


def test_depths_of_responses(client: OpenAI) -> None:
    whole = client.responses.create(**RESPONSE, extra_body=with_knobs(FORCED))
    assert whole.exit_depths == DEPTHS and whole.mean_exit_depth == 3.5
    events = list(client.responses.create(**RESPONSE, stream=True, extra_body=with_knobs(FORCED)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.exit_depths == DEPTHS
    assert not hasattr(client.responses.create(**RESPONSE), "exit_depths")


def test_saved_answers_are_read(client: OpenAI, address: str, tmp_path: Path) -> None:
    """What a user writes to a file is what `vllm-loopus depths` takes, token by token."""
    options = with_knobs(FORCED, logprobs=0)
    lines = [complete(client, FORCED, logprobs=0), complete(client, FORCED)]
    for token_ids in (True, False):
        body = {**COMPLETION, **options, "return_token_ids": token_ids}
        lines.append(send(address, "completions", body)[1])
    lines.append(
        client.chat.completions.create(**CHAT, logprobs=True, extra_body=with_knobs(FORCED))
    )
    lines.append(client.responses.create(**RESPONSE, extra_body=with_knobs(FORCED)))
    dumped = [line if isinstance(line, dict) else json.loads(line.to_json()) for line in lines]
    stream = {**CHAT, **with_knobs(FORCED), "stream": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(stream).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        events = response.read().decode()
    file = tmp_path / "run.jsonl"
    file.write_text("\n".join(map(json.dumps, dumped)) + "\n" + events)
    target = resolve(SERVED)
    vocabulary = load_vocabulary(target, LoopUSConfig.from_pretrained(target), None)
    answers = read(file, vocabulary)
    assert [answer.exit_depths for answer in answers] == [DEPTHS] * 7
    classes = [answer.classes for answer in answers]
    assert classes[0] == classes[2] == classes[3]  # by log-probabilities, and by ids
    # It went on after end-of-text, which a text alone does not show.
    assert classes[0].index("special") < len(DEPTHS) - 1 and classes[1] == [UNKNOWN] * len(DEPTHS)
    assert UNKNOWN not in classes[4]
    assert [answer.exit_depths for answer in read(file)] == [DEPTHS] * 7


def test_other_endpoints_say_that_they_give_no_depths(address: str) -> None:
    body = {"model": SERVED, "max_tokens": 4, "messages": CHAT["messages"]}
    for endpoint, messages in (
        ("messages", body["messages"]),
        ("chat/completions/batch", [body["messages"]]),
    ):
        request = {**body, "messages": messages, "vllm_xargs": {"max_loops": 3}}
        assert send(address, endpoint, request)[0] == 200
        request["vllm_xargs"]["return_exit_depths"] = 1
        status, answer = send(address, endpoint, request)
        assert status == 400 and "return_exit_depths" in answer["error"]["message"]


def test_reasoning_effort(client: OpenAI) -> None:
    """The efforts configured set the budget; `max_loops` wins; others change nothing."""
    knobs = {"exit_threshold": 1.0, "return_exit_depths": 1}  # never early
    for effort, loops in {**EFFORTS, "high": MAX_LOOPS}.items():
        chat = client.chat.completions.create(
            **CHAT, reasoning_effort=effort, extra_body=with_knobs(knobs)
        )
        assert set(chat.choices[0].exit_depths) == {loops}
        response = client.responses.create(
            **RESPONSE, reasoning={"effort": effort}, extra_body=with_knobs(knobs)
        )
        assert set(response.exit_depths) == {loops}
    explicit = with_knobs({**knobs, "max_loops": 3})
    chat = client.chat.completions.create(**CHAT, reasoning_effort="low", extra_body=explicit)
    assert set(chat.choices[0].exit_depths) == {3}


def test_concurrent_requests_equal_themselves_alone(client: OpenAI) -> None:
    settings = [
        {"max_loops": 2},
        {"exit_threshold": 0.5},
        {"exit_threshold": 0.9, "min_loops": 2},
        {"exit_threshold": 0.97, "max_loops": 6},
        {"exit_threshold": 1.0},
        {"exit_depths": [1, 8] * 6},
    ]
    requests = [
        (knobs | {"return_exit_depths": 1}, {"prompt": prompt, "max_tokens": 24})
        for knobs in settings
        for prompt in PROMPTS
    ]

    def answer(request: Any) -> tuple[str, list[int]]:
        choice = complete(client, request[0], **request[1]).choices[0]
        return choice.text, choice.exit_depths

    alone = [answer(request) for request in requests]
    assert len({tuple(depths) for _, depths in alone}) > len(settings)
    with ThreadPoolExecutor(len(requests)) as pool:
        for _ in range(2):
            assert list(pool.map(answer, requests)) == alone


BAD = [
    ("max_loops", "0"), ("max_loops", "-1"), ("max_loops", "9"), ("max_loops", "1.5"),
    ("max_loops", "true"), ("max_loops", '"4"'), ("max_loops", "NaN"), ("max_loops", "null"),
    ("max_loops", "{}"), ("max_loops", "[2]"), ("max_loops", "1" * 400),
    ("min_loops", "0"), ("min_loops", "false"), ("min_loops", "9"),
    ("exit_threshold", "-0.1"), ("exit_threshold", "NaN"), ("exit_threshold", "Infinity"),
    ("exit_threshold", "true"), ("exit_threshold", '"high"'), ("exit_threshold", "1" * 400),
    ("exit_depths", "3"), ("exit_depths", "[0]"), ("exit_depths", "[9]"), ("exit_depths", "[true]"),
    ("exit_depths", "[1.0]"), ("exit_depths", '["a"]'), ("exit_depths", "[[1]]"),
    ("exit_depths", str([1] * 13)), ("exit_depths", str([1] * 100_000)),
    ("return_exit_depths", "2"), ("return_exit_depths", '"yes"'),
    ("max_loop", "2"), ("maxloops", "2"), ("exit_treshold", "0.5"), ("loops", "2"), ("N", "2"),
    ("kv_policy", '"exact"'),
]  # fmt: skip


def test_bad_values_are_named_and_harm_nobody(client: OpenAI, address: str) -> None:
    """Every bad value at every endpoint, streamed or not, while a good request runs."""
    knobs = {"exit_threshold": 0.52, "return_exit_depths": 1}
    options = {"prompt": PROMPTS[3], "max_tokens": 230}
    alone = complete(client, knobs, **options).choices[0]
    stream = iter(complete(client, knobs, stream=True, **options))
    first = next(stream)
    text, last = first.choices[0].text, first.choices[0]
    for endpoint, good in ENDPOINTS.items():
        for number, (name, value) in enumerate(BAD):
            body = json.dumps({**good, "stream": number % 2 == 0})
            bad = f'{body[:-1]}, "vllm_xargs": {{"{name}": {value}}}}}'
            status, answer = send(address, endpoint, bad)
            assert status == 400, (endpoint, name, value[:50], answer)
            assert answer["error"]["param"].split(".")[-1] == name, (endpoint, name, answer)
            assert len(answer["error"]["message"]) < 3000
        pair = {**good, "vllm_xargs": {"min_loops": 4, "max_loops": 2}}
        status, answer = send(address, endpoint, pair)
        assert (status, answer["error"]["param"]) == (400, "min_loops")
        for name, value in (("max_loops", 4), ("exit_threshold", True), ("max_loop", 2)):
            status, answer = send(address, endpoint, {**good, name: value})
            assert (status, answer["error"]["param"]) == (400, name)
    for chunk in stream:
        text += chunk.choices[0].text
        last = chunk.choices[0]
    assert text == alone.text
    assert last.exit_depths == alone.exit_depths and len(last.exit_depths) == 230


def test_the_client_raises_bad_request(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="did you mean exit_threshold") as caught:
        complete(client, {"exit_treshold": 0.5})
    assert caught.value.param == "exit_treshold"
    with pytest.raises(BadRequestError, match="put it into vllm_xargs"):
        client.completions.create(**COMPLETION, extra_body={"max_loops": 4})


def test_arguments_of_others_pass(client: OpenAI) -> None:
    assert complete(client, {"session_id": "a", "my_processor": [1, "b"]}).choices[0].text


def test_beam_search_has_no_knobs(address: str) -> None:
    body = {**COMPLETION, "n": 2, "use_beam_search": True}
    assert send(address, "completions", body)[0] == 200
    status, answer = send(address, "completions", {**body, "vllm_xargs": {"max_loops": 3}})
    assert (status, answer["error"]["param"]) == (400, "max_loops")
    assert "use_beam_search" in answer["error"]["message"]
    status, answer = send(address, "completions", {**body, "vllm_xargs": {"exit_threshold": 0}})
    assert (status, answer["error"]["param"]) == (400, "exit_threshold")
