"""Bodies that nobody should send: prompts and lists of 100,000 entries."""

import asyncio
import json
import random
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from tests.load.client import Tally
from tests.load.items import Item
from tests.load.outcome import Outcome
from tests.load.server import MAX_MODEL_LEN, MODEL

QUICK = 10.0  # seconds; a refusal takes milliseconds even on a busy machine
SERVED = ("one token short of the limit",)


async def refused(address: str, tokens: int) -> Outcome:
    """Sends each beside a small request, which has to be answered as ever."""
    outcome = Outcome("huge", Tally())
    async with aiohttp.ClientSession() as session:
        for name, item in huge(tokens).items():
            outcome.tally.sent += 2
            started = time.monotonic()
            (status, told), (beside, _) = await asyncio.gather(
                _post(session, address, item), _post(session, address, SMALL)
            )
            seconds = time.monotonic() - started
            outcome.seen[f"{name}, {len(item.body):,} bytes"] = f"{status}: {told[:110]}"
            _count(outcome.tally, status)
            _count(outcome.tally, beside)
            outcome.require(beside == 200, f"{name}: the request beside it is answered")
            outcome.require(seconds < QUICK, f"{name}: answered in time, not after {seconds:.1f} s")
            wanted = 200 if name in SERVED else 400
            outcome.require(status == wanted, f"{name}: HTTP {wanted}, not {status}")
            most = 3000 + 2 * len(item.body)  # vLLM may list every entry that it refuses
            outcome.require(len(told) <= most, f"{name}: an answer of {len(told)} characters")
    return outcome


def huge(tokens: int) -> dict[str, Item]:
    """By name; all but those in `SERVED` have to be refused."""
    rng = random.Random(0)
    text = "".join(rng.choice("0123456789+-*=") for _ in range(tokens))
    ids = [rng.randrange(10) for _ in range(tokens)]
    small: dict[str, Any] = {"model": MODEL, "prompt": "3+2=", "max_tokens": 2, "temperature": 0}
    bodies: dict[str, dict[str, Any]] = {
        "prompt of text": {**small, "prompt": text},
        "prompt of token ids": {**small, "prompt": ids},
        "one token short of the limit": {
            **small,
            "prompt": ids[: MAX_MODEL_LEN - 1],
            "max_tokens": 1,
        },
        "exit_depths": {**small, "vllm_xargs": {"exit_depths": [1] * tokens}},
        "exit_depths of floats": {**small, "vllm_xargs": {"exit_depths": [0.5] * tokens}},
        "max_loops as a list": {**small, "vllm_xargs": {"max_loops": ids}},
        "knobs by the thousand": {
            **small,
            "vllm_xargs": {f"max_loops_{number}": 1 for number in range(tokens // 100)},
        },
        "stop strings": {**small, "stop": ["no such text"] * tokens},
        "logit_bias": {**small, "logit_bias": {str(n): 1 for n in range(tokens)}},
        "n": {**small, "n": tokens},
        "logprobs": {**small, "logprobs": tokens},
        "max_tokens": {**small, "max_tokens": tokens},
        "many prompts": {**small, "prompt": [[1]] * tokens},
    }
    items = {name: Item("completions", json.dumps(body)) for name, body in bodies.items()}
    chat = {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": text}]}
    items["message of a chat"] = Item("chat/completions", json.dumps(chat))
    items["stream"] = items["prompt of text"].with_fields(stream=True)
    return items


SMALL = Item(
    "completions",
    json.dumps({"model": MODEL, "prompt": "3+2=", "max_tokens": 2, "temperature": 0}),
)


async def _post(session: aiohttp.ClientSession, address: str, item: Item) -> tuple[int, str]:
    headers = {"Content-Type": "application/json"}
    url = f"{address}/v1/{item.endpoint}"
    async with session.post(url, data=item.body.encode(), headers=headers) as response:
        text = await response.text()
        try:
            error: Mapping[str, Any] = json.loads(text)["error"]
            text = str(error["message"])
        except (ValueError, KeyError, TypeError):
            pass
        return response.status, text


def _count(tally: Tally, status: int) -> None:
    if status == 200:
        tally.answered += 1
    else:
        tally.failed[f"HTTP {status}"] += 1
