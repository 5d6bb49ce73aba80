"""A real `vllm serve loopus-tiny` answers as any model does."""

import os
import time
import urllib.request
from collections.abc import Iterator

import pytest
from openai import NotFoundError, OpenAI

from examples.demo import running_server
from vllm_loopus.aliases import EMBEDDED

MODEL = "loopus-tiny"
QUESTION = "(3+4)="


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment.pop("HF_HUB_OFFLINE", None)  # a user has not set it, and nothing may be fetched
    arguments = ("--model", MODEL, "--max-model-len", "256")
    with log.open("w") as output:
        try:
            with running_server(*arguments, environment=environment, output=output) as address:
                yield address
        except RuntimeError as error:
            raise RuntimeError(log.read_text()[-3000:]) from error


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def get(address: str, path: str) -> str:
    with urllib.request.urlopen(address + path, timeout=10) as response:
        assert response.status == 200
        return response.read().decode()


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
            model=MODEL, prompt=QUESTION, max_tokens=8, temperature=1.5, n=3, seed=5,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return [choice.text for choice in answer.choices]

    first = sample()
    assert len(first) == 3
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


def test_metrics_count_the_tokens(address: str, client: OpenAI) -> None:
    def generated() -> float:
        lines = get(address, "/metrics").splitlines()
        return sum(
            float(x.split()[-1]) for x in lines if x.startswith("vllm:generation_tokens_total")
        )

    before = generated()
    client.completions.create(
        model=MODEL, prompt=QUESTION, max_tokens=7, extra_body={"ignore_eos": True}
    )
    deadline = time.monotonic() + 10
    while generated() - before < 7 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert generated() - before == 7


def test_unknown_model(client: OpenAI) -> None:
    with pytest.raises(NotFoundError):
        client.completions.create(model="loopus-huge", prompt="a", max_tokens=1)


def test_the_served_folder_is_the_embedded_one() -> None:
    assert (EMBEDDED[MODEL] / "model.safetensors").stat().st_size < 4 * 2**20
