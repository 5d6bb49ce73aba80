"""Requests of every kind that the server takes, drawn at random."""

import json
import random
from dataclasses import dataclass
from typing import Any

from tests.load.server import MODEL
from vllm_loopus.tiny.tasks import conversation

NEW_TOKENS = 24


@dataclass(frozen=True)
class Item:
    """One request: `endpoint` below `/v1/`, and its body as JSON."""

    endpoint: str
    body: str

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.body)

    def with_fields(self, **more: Any) -> "Item":
        return Item(self.endpoint, json.dumps({**self.fields, **more}))


def mixed(count: int, seed: int, new_tokens: int = NEW_TOKENS) -> list[Item]:
    """Chats and completions, streamed and whole, greedy and seeded, with `n`, logprobs and knobs;
    prompts share their beginnings and have lengths with a long tail. Half of the answers have
    `new_tokens` tokens, the others fewer."""
    rng = random.Random(seed)
    return [_one(rng, number, new_tokens) for number in range(count)]


def tiny(count: int, seed: int) -> list[Item]:
    """Completions of a few characters and one or two tokens."""
    rng = random.Random(seed)
    return [
        Item(
            "completions",
            json.dumps(
                {
                    "model": MODEL,
                    "prompt": f"{rng.randint(0, 9)}+{rng.randint(0, 2)}=",
                    "max_tokens": rng.randint(1, 2),
                    "temperature": 0,
                    "ignore_eos": True,
                }
            ),
        )
        for _ in range(count)
    ]


def long_one(tokens: int = 200, **more: Any) -> Item:
    """A completion that takes a while, streamed."""
    body = {"model": MODEL, "prompt": "a:ab,bc,cd=", "max_tokens": tokens, "temperature": 0}
    return Item("completions", json.dumps({**body, "ignore_eos": True, "stream": True, **more}))


def _one(rng: random.Random, number: int, new_tokens: int) -> Item:
    task = rng.choice(["swaps", "arithmetic"])
    earlier = conversation(task, rng.choice([1, 1, 1, 2, 6]), random.Random(rng.randrange(8)))
    prompt = "".join(f"{item.question}{item.answer};" for item in earlier[:-1])
    prompt += earlier[-1].question
    most = rng.choice([2, 4, 8, 8])
    knobs: dict[str, Any] = {"max_loops": most, "return_exit_depths": 1}
    if rng.random() < 0.2:
        knobs["exit_depths"] = [rng.randint(1, most) for _ in range(new_tokens)]
    else:
        knobs["exit_threshold"] = rng.choice([0.5, 0.7, 0.9, 2.0])
        knobs["min_loops"] = rng.choice([1, min(2, most)])
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": rng.choice([2, new_tokens // 3, new_tokens, new_tokens]),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stream": rng.random() < 0.5,
        "vllm_xargs": knobs,
    }
    if "exit_depths" in knobs:
        knobs["exit_depths"] = knobs["exit_depths"][: body["max_tokens"]]
    if rng.random() < 0.5:
        body |= {"temperature": rng.choice([0.7, 1.3]), "seed": number, "n": rng.choice([1, 2, 3])}
    else:
        body["temperature"] = 0
    chat = rng.random() < 0.4
    if rng.random() < 0.4:
        body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    if chat:
        return Item(
            "chat/completions",
            json.dumps({**body, "messages": [{"role": "user", "content": prompt}]}),
        )
    return Item("completions", json.dumps({**body, "prompt": prompt}))
