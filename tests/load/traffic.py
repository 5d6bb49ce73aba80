"""How requests arrive: from so many clients that each wait for their answer, or at a rate."""

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.load.alone import Answered
from tests.load.client import Client
from tests.load.items import Item

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
KNEE = 0.9  # of the greatest throughput


@dataclass(frozen=True)
class Load:
    """Throughput (requests a second) and median latency (s) at so many clients."""

    clients: int
    rate: float
    latency: float

    def __str__(self) -> str:
        told = f"{self.clients} clients, {self.rate:.1f} requests/s"
        return f"{told}, median latency {self.latency:.3f} s"


async def from_clients(
    client: Client,
    items: Sequence[Item],
    clients: int,
    seed: int,
    *,
    seconds: float = float("inf"),
    requests: int | None = None,
    leave_after: Callable[[random.Random], float | None] = lambda rng: None,
) -> Answered:
    """`clients` clients send the next request when they have their answer, for `seconds` or until
    `requests` were sent. `leave_after` draws when a client hangs up. Returns what was answered."""
    answered: Answered = []
    deadline = time.monotonic() + seconds
    left = requests if requests is not None else float("inf")

    async def one(rng: random.Random) -> None:
        nonlocal left
        while time.monotonic() < deadline and left > 0:
            left -= 1
            item = rng.choice(items)
            answer = await client.ask(item, leave_after(rng))
            if answer is not None:
                answered.append((item, answer))

    await asyncio.gather(*(one(random.Random(seed * 1000 + index)) for index in range(clients)))
    return answered


async def at_rate(
    client: Client, items: Sequence[Item], rate: float, seconds: float, seed: int
) -> Answered:
    """Poisson arrivals at `rate` a second, whatever the server says. Returns what was answered."""
    answered: Answered = []
    rng = random.Random(seed)
    started = time.monotonic()
    next_at = 0.0

    async def one(item: Item) -> None:
        answer = await client.ask(item)
        if answer is not None:
            answered.append((item, answer))

    async with asyncio.TaskGroup() as tasks:
        while (now := time.monotonic() - started) < seconds:
            while next_at <= now:
                tasks.create_task(one(rng.choice(items)))
                next_at += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, min(next_at - now, 0.1)))
    return answered


async def measure(
    client: Client, items: Sequence[Item], clients: int, seconds: float, seed: int
) -> Load:
    """What the server does for so many clients."""
    started = time.monotonic()
    answered = await from_clients(client, items, clients, seed, seconds=seconds)
    latencies = [answer.seconds for _, answer in answered] or [float("inf")]
    rate = len(answered) / (time.monotonic() - started)
    return Load(clients, rate, statistics.median(latencies))


async def find_knee(client: Client, items: Sequence[Item], seconds: float, seed: int) -> Load:
    """The fewest clients that get `KNEE` of the greatest throughput; `seconds` at each step."""
    await measure(client, items, 4, seconds, seed)  # warm
    loads: list[Load] = []
    for clients in CONCURRENCIES:
        loads.append(await measure(client, items, clients, seconds, seed))
        if len(loads) > 2 and loads[-1].rate < 1.05 * loads[-2].rate:
            break  # past it: more clients only wait
    best = max(load.rate for load in loads)
    return next(load for load in loads if load.rate >= KNEE * best)
