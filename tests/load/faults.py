"""Faults: signals in the middle of requests, killed processes, a clock that jumps."""

import asyncio
import signal
import time
from pathlib import Path

from tests.load.alone import compare
from tests.load.client import Client
from tests.load.items import long_one, mixed
from tests.load.outcome import Outcome
from tests.load.server import Server, wait_until
from tests.load.traffic import from_clients

DRAIN_SECONDS = 60
REFUSED = {"HTTP 500", "HTTP 503", "connection refused"}  # vLLM 0.32: 500, see docs/reliability.md
SETTLED = 30.0  # seconds in which processes of a killed server have to be gone
CLOCK = Path(__file__).with_name("clock")  # a folder with a sitecustomize.py
JUMP = 3600


async def drained(server: Server, clients: int) -> Outcome:
    """SIGTERM with requests in flight: they are answered, later ones refused, exit code 0."""
    outcome = Outcome("drain")
    items = [long_one(150, stream=number % 2 == 0) for number in range(clients)]
    async with Client.to(server.address) as client, Client.to(server.address) as late:
        tasks = [asyncio.create_task(client.ask(item)) for item in items]
        await asyncio.to_thread(wait_until, lambda: _running(server) >= clients, 30)
        server.look()
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        await asyncio.gather(*(late.ask(item) for item in items[:4]))
        await asyncio.gather(*tasks)
        outcome.seen["in-flight answers after"] = f"{time.monotonic() - started:.1f} s"
    code = await asyncio.to_thread(server.wait, DRAIN_SECONDS + 30)
    outcome.tally = client.tally
    outcome.seen["sent after the signal"] = late.tally
    outcome.seen["exit code"] = code
    outcome.require(client.tally.answered == clients, "all requests in flight are answered")
    outcome.require(late.tally.good, "later requests are told")
    outcome.require(set(late.tally.failed) <= REFUSED, "later requests get an error, or no server")
    outcome.require(not late.tally.answered, "later requests are refused")
    outcome.require(code == 0, "exit code 0")
    _require_gone(outcome, server)
    return outcome


async def killed(server: Server, role: str, clients: int) -> Outcome:
    """SIGKILL of `engine` or `worker 1`, busy and idle, and a start on the same port after each."""
    outcome = Outcome(f"kill, {role}")
    items = [long_one(200, stream=number % 2 == 0) for number in range(clients)]
    codes = []
    async with Client.to(server.address) as client:
        tasks = [asyncio.create_task(client.ask(item)) for item in items]
        await asyncio.to_thread(wait_until, lambda: _running(server) >= clients, 30)
        server.look()[role].kill()
        await asyncio.gather(*tasks)
        told = dict(client.tally.failed)
        codes.append(await asyncio.to_thread(server.wait))
        _require_gone(outcome, server)

        await asyncio.to_thread(server.start)
        outcome.require(await client.ask(long_one(8)), "the server answers after a new start")
        answers = client.tally.answered
        server.look()[role].kill()
        unhealthy = await asyncio.to_thread(wait_until, lambda: server.health() == 503, 20)
        codes.append(await asyncio.to_thread(server.wait))
        _require_gone(outcome, server)
    outcome.tally = client.tally
    outcome.seen["told to those in flight"] = told
    outcome.seen["exit codes"] = codes
    outcome.require(answers == 1 and client.tally.failed.total() == clients, "who is cut is told")
    broken = [reason for reason in told if reason.startswith("connection")]
    outcome.require(not broken, "an error says so, not a broken connection")
    outcome.require(unhealthy, "/health says 503")
    return outcome


async def jumping(server: Server, seconds: float, checked: int, seed: int) -> Outcome:
    """Mixed load while `time.time` of every process jumps by an hour, forward and back."""
    outcome = Outcome("clock")
    jumps = Path(server.environment["LOOPUS_CLOCK"])
    steps = 0
    async with Client.to(server.address) as client:
        load = asyncio.create_task(from_clients(client, mixed(200, seed), 8, seed, seconds=seconds))
        while not load.done():
            steps += 1
            jumps.write_text(str((JUMP, 0, -JUMP, 0)[steps % 4]))
            await asyncio.sleep(1)
        answered = await load
    outcome.tally = client.tally
    outcome.seen["jumps"] = steps
    processes = server.log.read_text().count("a clock that jumps")
    outcome.seen["processes with such a clock"] = processes
    outcome.require(processes >= 2, "the clocks of server and engine jump")
    outcome.require(not client.tally.failed, "no request fails")
    outcome.require(wait_until(server.idle, 20), "nothing is left running, waiting or held")
    jumps.write_text("0")
    (await compare(server.address, answered, checked, seed)).tell(outcome, min(checked, 20))
    return outcome


def _running(server: Server) -> float:
    return server.metrics()["vllm:num_requests_running"]


def _require_gone(outcome: Outcome, server: Server) -> None:
    """No process and no shared memory is left of a server that has ended."""
    gone = wait_until(lambda: not server.left_behind(), SETTLED)
    outcome.require(gone, f"no process is left: {server.left_behind()}")
    left = wait_until(lambda: not server.shared_memory_left(), 5)
    outcome.require(left, f"no shared memory is left: {server.shared_memory_left()}")
