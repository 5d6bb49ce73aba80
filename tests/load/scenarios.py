"""Load: at the knee, far beyond it, with clients that hang up, in a pool that is too small."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.load.alone import compare
from tests.load.client import Client
from tests.load.items import Item, long_one, mixed, tiny
from tests.load.outcome import Outcome
from tests.load.server import MIB, Memory, Served, Server, wait_until
from tests.load.traffic import at_rate, find_knee, from_clients, measure

# A stream that is checked, but finds the queue full when it is added, has had its 200 already.
REFUSED = {"HTTP 503", "error event 503"}
GROWTH = 64 * MIB  # of a process under load that is still none: allocators keep what they had
LEAK = 4 * MIB  # of a process over thousands of requests when it has seen all kinds
LONG_ANSWER = 120  # tokens


@dataclass
class Watch:
    """Memory and queue of a server, looked at every second."""

    first: dict[str, Memory] = field(default_factory=dict)
    last: dict[str, Memory] = field(default_factory=dict)
    most_waiting: float = 0
    most_at_once: float = 0

    @asynccontextmanager
    async def of(self, server: Server) -> AsyncIterator["Watch"]:
        self.first = self.last = server.memory()
        task = asyncio.create_task(self._look(server))
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.last = server.memory()

    async def _look(self, server: Server) -> None:
        while True:
            try:
                found = await asyncio.to_thread(server.metrics)
            except OSError:  # a busy machine: the next look tells as much
                await asyncio.sleep(1)
                continue
            waiting = found["vllm:num_requests_waiting"]
            self.most_waiting = max(self.most_waiting, waiting)
            together = waiting + found["vllm:num_requests_running"]
            self.most_at_once = max(self.most_at_once, together)
            await asyncio.sleep(1)

    def tell(self, outcome: Outcome) -> None:
        for role, before in self.first.items():
            outcome.seen[f"memory of {role}"] = f"{before}, at the end {self.last[role]}"


async def at_the_knee(server: Server, minutes: float, checked: int, seed: int) -> Outcome:
    """Mixed load from as many clients as the server serves at full throughput."""
    outcome, watch = Outcome("load"), Watch()
    items = mixed(400, seed)
    async with Client.to(server.address) as ramp:
        knee = await find_knee(ramp, items, _ramp(minutes), seed)
    async with Client.to(server.address) as client, watch.of(server):
        answered = await from_clients(client, items, knee.clients, seed, seconds=60 * minutes)
    outcome.tally = client.tally
    outcome.seen["knee"] = knee
    outcome.seen["in the ramp before"] = ramp.tally
    outcome.seen["requests/s"] = f"{len(answered) / (60 * minutes):.1f}"
    watch.tell(outcome)
    outcome.require(ramp.tally.good and not ramp.tally.failed, "the ramp is answered whole")
    outcome.require(not client.tally.failed, "no request fails at the knee")
    (await compare(server.address, answered, checked, seed)).tell(outcome, checked)
    outcome.require(wait_until(server.idle, 20), "nothing is left running, waiting or held")
    return outcome


async def overloaded(
    server: Server, seconds: float, queue: int, factor: float, checked: int, seed: int
) -> Outcome:
    """Arrivals at `factor` times the knee's rate, for a server that takes `queue` at a time.

    Answers are long, so that it is the engine that has too much to do: to refuse a request costs
    the one thread of the HTTP server milliseconds, and it is not to be out of breath itself.
    """
    outcome, watch = Outcome("overload"), Watch()
    items = mixed(400, seed, LONG_ANSWER)
    async with Client.to(server.address) as before:
        knee = await find_knee(before, items, _ramp(seconds / 60), seed)
        calm = await measure(before, items, 2, _ramp(seconds / 60), seed)
        # What an allocator takes once under pressure it keeps; growth is what comes after.
        await at_rate(before, items, factor * knee.rate, min(10, seconds), seed + 1)
    async with Client.to(server.address) as client, watch.of(server):
        answered = await at_rate(client, items, factor * knee.rate, seconds, seed)
    async with Client.to(server.address) as after:
        started = time.monotonic()
        again = await measure(after, items, 2, _ramp(seconds / 60), seed)
        while again.latency > 1.5 * calm.latency and time.monotonic() - started < 60:
            again = await measure(after, items, 2, _ramp(seconds / 60), seed)
    outcome.tally = client.tally
    outcome.seen["knee"] = knee
    outcome.seen["arrivals"] = f"{factor * knee.rate:.0f} requests/s for {seconds:.0f} s"
    outcome.seen["most at once, most waiting"] = f"{watch.most_at_once:g}, {watch.most_waiting:g}"
    refused = server.metrics()["vllm:admission_rejections_total"]
    outcome.seen["vllm:admission_rejections_total"] = f"{refused:g}"
    outcome.seen["before, calm"], outcome.seen["after"] = calm, again
    watch.tell(outcome)
    outcome.require(set(client.tally.failed) <= REFUSED, f"all that fail are told {REFUSED}")
    outcome.require(client.tally.failed["HTTP 503"], "more arrives than is taken")
    outcome.require(watch.most_at_once <= queue, f"at most {queue} are taken at once")
    _require_flat(outcome, watch)
    outcome.require(after.tally.good and not after.tally.failed, "afterwards all are answered")
    outcome.require(again.latency <= 1.5 * calm.latency, "latency is as before within a minute")
    (await compare(server.address, answered, checked, seed)).tell(outcome, min(checked, 200))
    outcome.require(wait_until(server.idle, 20), "nothing is left running, waiting or held")
    return outcome


async def hung_up(server: Served, seconds: float, clients: int, checked: int, seed: int) -> Outcome:
    """Clients of which two in three hang up at a random moment."""
    outcome = Outcome("aborts")
    items = mixed(200, seed)
    async with Client.to(server.address) as first:
        usual = await measure(first, items, clients, min(5, seconds), seed)

    def leave_after(rng: random.Random) -> float | None:
        return rng.uniform(0, 1.2 * usual.latency) if rng.random() < 2 / 3 else None

    async with Client.to(server.address) as client:
        answered = await from_clients(
            client, items, clients, seed, seconds=seconds, leave_after=leave_after
        )
    outcome.tally = client.tally
    outcome.require(client.tally.cancelled, "clients hang up")
    outcome.require(not client.tally.failed, "who stays is answered")
    outcome.require(wait_until(server.idle, 20), "nothing is left running, waiting or held")
    (await compare(server.address, answered, checked, seed)).tell(outcome, min(checked, 20))
    return outcome


async def too_small(server: Server, seconds: float, checked: int, seed: int) -> Outcome:
    """More long, deep sequences than the pool holds, after shallow ones that promised less."""
    outcome = Outcome("exhaustion")
    rng = random.Random(seed)

    def one(depth: int, tokens: int, number: int) -> Item:
        knobs = {"exit_depths": [depth] * tokens, "return_exit_depths": 1}
        prompt = "".join(rng.choice("0123456789+-*=") for _ in range(rng.randint(4, 100)))
        more = {"prompt": prompt, "n": 1, "vllm_xargs": knobs, "seed": number}
        return long_one(tokens, **more)

    shallow = [one(1, 4, number) for number in range(20)]
    deep = [one(rng.choice([1, 8]), rng.choice([40, 140]), number) for number in range(60)]
    answered = []
    started = time.monotonic()
    async with Client.to(server.address) as client:
        while time.monotonic() - started < seconds:
            answered += await from_clients(client, shallow, 4, seed, requests=40)
            answered += await from_clients(client, deep, 16, seed, requests=48)
    outcome.tally = client.tally
    preemptions = server.metrics()["vllm:num_preemptions_total"]
    outcome.seen["vllm:num_preemptions_total"] = f"{preemptions:g}"
    outcome.require(preemptions, "the pool runs out, and sequences are preempted")
    outcome.require(not client.tally.failed, "no request fails")
    outcome.require(wait_until(server.idle, 20), "nothing is left running, waiting or held")
    (await compare(server.address, answered, checked, seed)).tell(outcome, min(checked, 20))
    return outcome


async def flat(server: Server, requests: int, clients: int, seed: int) -> Outcome:
    """Thousands of tiny requests; memory after each fifth.

    It may grow a little at first: oneDNN keeps a kernel for each matrix and number of rows, and
    rare numbers come late. In the last fifth it must not.
    """
    outcome = Outcome("flat")
    items = tiny(200, seed)
    at: list[tuple[int, dict[str, Memory]]] = []
    started = time.monotonic()
    async with Client.to(server.address) as client:
        for part in range(5):
            await from_clients(client, items, clients, seed + part, requests=requests // 5)
            at.append((client.tally.sent, server.memory()))
    outcome.tally = client.tally
    outcome.seen["requests/s"] = f"{client.tally.sent / (time.monotonic() - started):.0f}"
    for sent, memory in at:
        told = "; ".join(f"{role}: {value}" for role, value in memory.items())
        outcome.seen[f"after {sent:,}"] = told
    first, before_last, end = at[0][1], at[-2][1], at[-1][1]
    for role, memory in end.items():
        late, all_in_all = memory.uss - before_last[role].uss, memory.uss - first[role].uss
        outcome.seen[f"growth of {role}"] = (
            f"{all_in_all / MIB:+.1f} MiB USS after the first fifth, {late / MIB:+.1f} in the last"
        )
        outcome.require(late < LEAK, f"memory of {role} is flat in the last fifth")
        outcome.require(all_in_all < GROWTH, f"memory of {role} levels off")
    outcome.require(client.tally.answered == client.tally.sent, "every request is answered")
    outcome.require(wait_until(server.idle, 20), "nothing is left running, waiting or held")
    return outcome


def _ramp(minutes: float) -> float:
    """Seconds at each step of a ramp."""
    return 10 if minutes >= 5 else 3


def _require_flat(outcome: Outcome, watch: Watch) -> None:
    for role, before in watch.first.items():
        grown = watch.last[role].uss - before.uss
        outcome.require(grown < GROWTH, f"memory of {role} does not grow: {grown / MIB:+.1f} MiB")
