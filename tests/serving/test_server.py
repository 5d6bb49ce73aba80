"""A real `vllm serve loopus-tiny` answers as any model does."""

import pytest
from openai import NotFoundError, OpenAI

from tests.serving.conftest import SERVED as MODEL
from tests.serving.conftest import get
from vllm_loopus.aliases import EMBEDDED

QUESTION = "(3+4)="


def test_models_and_health(address: str, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    get(address, "/health")


def test_completion_and_streaming_agree(client: OpenAI) -> None:
    options = {"model": MODEL, "prompt": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**options, extra_body={"ignore_eos": True})
    pieces = client.completions.create(**options, stream=True, extra_body={"ignore_eos": True})
    assert whole.usage.completion_tokens == 12
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text != ""


def test_chat_and_streaming_agree(client: OpenAI) -> None:
    options = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**options)
    pieces = client.chat.completions.create(**options, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert streamed == whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.prompt_tokens == len(QUESTION) + 3  # user, end, assistant


def test_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=QUESTION, max_tokens=4, temperature=0, logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 4
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert chosen == max(top.values())


def test_several_choices_and_seed(client: OpenAI) -> None:
    def sample() -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt=QUESTION, max_tokens=8, temperature=2, n=8, seed=5,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return [choice.text for choice in answer.choices]

    first = sample()
    assert len(first) == 8
    assert len(set(first)) > 1
    assert sample() == first


def test_stop_string(client: OpenAI) -> None:
    everything = {"ignore_eos": True, "skip_special_tokens": False}
    options = {"model": MODEL, "prompt": QUESTION, "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**options, extra_body=everything).choices[0].text
    stop = text[-3:]
    answer = client.completions.create(**options, stop=stop, extra_body=everything)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(stop)]


def test_unknown_model(client: OpenAI) -> None:
    with pytest.raises(NotFoundError):
        client.completions.create(model="loopus-huge", prompt="a", max_tokens=1)


def test_the_served_folder_is_the_embedded_one() -> None:
    assert (EMBEDDED[MODEL] / "model.safetensors").stat().st_size < 4 * 2**20
