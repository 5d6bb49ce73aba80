"""The outside client: sends requests, reads answers to their end, counts what became of each."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.load.items import Item

PATIENCE = 120.0  # seconds without an end after which a request counts as lost
CLOSE = 1e-3  # log-probabilities of an answer in company and alone
TIE = 1e-4  # a gap between the two best tokens that rounding may turn around


@dataclass
class Choice:
    """One choice of an answer."""

    text: str = ""
    finish_reason: str | None = None
    exit_depths: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # between the two best tokens

    def same(self, other: "Choice") -> bool:
        """Text and depths equal, log-probabilities close."""
        return (self.text, self.finish_reason, self.exit_depths, len(self.logprobs)) == (
            *(other.text, other.finish_reason, other.exit_depths, len(other.logprobs)),
        ) and all(abs(a - b) < CLOSE for a, b in zip(self.logprobs, other.logprobs, strict=True))


@dataclass
class Answer:
    """All choices of a complete answer, and the seconds that it took."""

    choices: dict[int, Choice]
    seconds: float = 0.0

    def same(self, other: "Answer") -> bool:
        return self.choices.keys() == other.choices.keys() and all(
            choice.same(other.choices[index]) for index, choice in self.choices.items()
        )


class FailedError(Exception):
    """The request got an error; its text is the reason that is counted."""


class LostError(Exception):
    """The request got neither an answer nor an error."""


@dataclass
class Tally:
    """What became of the requests. Each is in exactly one of the counts below `sent`."""

    sent: int = 0
    answered: int = 0
    cancelled: int = 0  # by this client
    failed: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> bool:
        accounted = self.answered + self.cancelled + self.failed.total() + self.lost.total()
        return accounted == self.sent and not self.lost

    def __str__(self) -> str:
        told = ", ".join(f"{reason} {count}" for reason, count in self.failed.most_common())
        lost = ", ".join(f"{reason} {count}" for reason, count in self.lost.most_common())
        return (
            f"sent {self.sent}, answered {self.answered}, "
            f"failed {self.failed.total()}{f' ({told})' if told else ''}, "
            f"cancelled by the client {self.cancelled}, "
            f"lost {self.lost.total()}{f' ({lost})' if lost else ''}"
        )


class Client:
    """Sends to one server. `async with Client.to(address) as client`."""

    def __init__(self, address: str, session: aiohttp.ClientSession) -> None:
        self.address, self.session = address, session
        self.tally = Tally()

    @classmethod
    @asynccontextmanager
    async def to(cls, address: str) -> AsyncIterator["Client"]:
        connector = aiohttp.TCPConnector(limit=0)
        # The client's own patience is `PATIENCE`; 503 of an overloaded server is not tried again.
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            yield cls(address, session)

    async def ask(self, item: Item, leave_after: float | None = None) -> Answer | None:
        """Sends it and counts; None where there is no answer. `leave_after`: seconds after which
        the client hangs up."""
        tally = self.tally
        tally.sent += 1
        try:
            async with asyncio.timeout(PATIENCE if leave_after is None else leave_after):
                answer = await self._answer(item)
        except TimeoutError:
            if leave_after is None:
                tally.lost["no end"] += 1
            else:
                tally.cancelled += 1
        except FailedError as error:
            tally.failed[str(error)] += 1
        except LostError as error:
            tally.lost[str(error)] += 1
        except (aiohttp.ClientConnectorError, ConnectionRefusedError):
            tally.failed["connection refused"] += 1
        except (aiohttp.ClientError, ConnectionError):
            tally.failed["connection broken"] += 1
        else:
            tally.answered += 1
            return answer
        return None

    async def _answer(self, item: Item) -> Answer:
        started = time.monotonic()
        url, headers = f"{self.address}/v1/{item.endpoint}", {"Content-Type": "application/json"}
        async with self.session.post(url, data=item.body.encode(), headers=headers) as response:
            if response.status != 200:
                raise FailedError(f"HTTP {response.status}")
            if response.content_type == "text/event-stream":
                choices = await _streamed(response)
            else:
                choices = {}
                for found in (await response.json())["choices"]:
                    _add(choices, found)
        wanted = json.loads(item.body).get("n") or 1
        if len(choices) != wanted or not all(one.finish_reason for one in choices.values()):
            raise LostError("part of an answer")
        if any(one.finish_reason in ("abort", "error") for one in choices.values()):
            raise FailedError("finish reason abort")
        return Answer(choices, time.monotonic() - started)


async def _streamed(response: aiohttp.ClientResponse) -> dict[int, Choice]:
    choices: dict[int, Choice] = {}
    done = False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            raise FailedError(f"error event {event['error'].get('code')}")
        for found in event["choices"]:
            _add(choices, found)
    if not done:
        raise LostError("a stream without an end")
    return choices


def _add(choices: dict[int, Choice], found: dict[str, Any]) -> None:
    """A choice, or what a chunk brings of one."""
    choice = choices.setdefault(found["index"], Choice())
    said = found.get("message") or found.get("delta")
    choice.text += (said.get("content") or "") if said is not None else found.get("text") or ""
    choice.finish_reason = found.get("finish_reason") or choice.finish_reason
    choice.exit_depths += found.get("exit_depths") or []
    logprobs = found.get("logprobs") or {}
    if "content" in logprobs:  # of a chat
        tops = [[top["logprob"] for top in one["top_logprobs"]] for one in logprobs["content"]]
        choice.logprobs += [one["logprob"] for one in logprobs["content"]]
    else:
        tops = [list(top.values()) for top in logprobs.get("top_logprobs") or ()]
        choice.logprobs += logprobs.get("token_logprobs") or []
    choice.gaps += [_gap(top) for top in tops]


def _gap(top: Iterable[float]) -> float:
    best = sorted(top, reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")
