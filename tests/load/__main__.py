"""`python -m tests.load COMMAND`: each starts its own server, takes a bounded time, prints counts.

Exit code 1: a request was lost, or something was not as promised.
"""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import typer

from tests.load import bodies, faults, scenarios
from tests.load.outcome import Outcome
from tests.load.server import Server

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Seed = Annotated[int, typer.Option(help="Of everything drawn.")]
Checked = Annotated[int, typer.Option(help="Answers to compare with their answers alone.")]
Clients = Annotated[int, typer.Option(help="Clients at once.")]
Seconds = Annotated[float, typer.Option(help="How long requests are sent.")]


def run(server: Server, scenario: Callable[[Server], Awaitable[Outcome]]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped, too
    with server:
        asyncio.run(_awaited(scenario(server))).tell()


async def _awaited(outcome: Awaitable[Outcome]) -> Outcome:
    return await outcome


@app.command()
def load(minutes: float = 20, checked: Checked = 400, seed: Seed = 0) -> None:
    """Mixed load at the knee, which a ramp finds first."""
    run(Server(), lambda server: scenarios.at_the_knee(server, minutes, checked, seed))


@app.command()
def overload(
    seconds: Seconds = 120,
    queue: Annotated[int, typer.Option(help="--max-num-queued-reqs of the server.")] = 64,
    factor: Annotated[float, typer.Option(help="Arrivals over the knee's.")] = 10,
    checked: Checked = 200,
    seed: Seed = 0,
) -> None:
    """Ten times what the server can do, with a bounded queue."""
    server = Server(("--max-num-queued-reqs", str(queue)))
    run(server, lambda s: scenarios.overloaded(s, seconds, queue, factor, checked, seed))


@app.command()
def aborts(
    seconds: Seconds = 60, clients: Clients = 24, checked: Checked = 100, seed: Seed = 0
) -> None:
    """Clients that hang up at random moments."""
    run(Server(), lambda s: scenarios.hung_up(s, seconds, clients, checked, seed))


@app.command()
def exhaustion(seconds: Seconds = 60, checked: Checked = 60, seed: Seed = 0) -> None:
    """A pool of K/V for two sequences of full length and depth."""
    blocks = 2 * (256 // 32) * 8 + 1
    server = Server(("--num-gpu-blocks-override", str(blocks), "--block-size", "32"))
    run(server, lambda s: scenarios.too_small(s, seconds, checked, seed))


@app.command()
def flat(
    requests: Annotated[int, typer.Option(help="In all.")] = 50_000,
    clients: Clients = 32,
    seed: Seed = 0,
) -> None:
    """Memory over thousands of tiny requests."""
    run(Server(), lambda s: scenarios.flat(s, requests, clients, seed))


@app.command()
def drain(clients: Clients = 12) -> None:
    """SIGTERM with requests in flight."""
    server = Server(("--shutdown-timeout", str(faults.DRAIN_SECONDS)))
    run(server, lambda s: faults.drained(s, clients))


@app.command()
def kill(
    role: Annotated[str, typer.Argument(help="engine or worker")], clients: Clients = 8
) -> None:
    """SIGKILL of the engine core, or of one of two ranks."""
    if role not in ("engine", "worker"):
        raise typer.BadParameter(f"role={role!r} is unknown; choose engine or worker")
    if role == "engine":
        run(Server(), lambda s: faults.killed(s, "engine", clients))
        return
    two = Server(("--tensor-parallel-size", "2"), {"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    run(two, lambda s: faults.killed(s, "worker 1", clients))


@app.command()
def clock(seconds: Seconds = 30, checked: Checked = 60, seed: Seed = 0) -> None:
    """Clocks that jump by an hour, forward and back, every second."""
    with tempfile.TemporaryDirectory() as folder:
        jumps = Path(folder) / "seconds"
        jumps.write_text("0")
        path = os.pathsep.join([str(faults.CLOCK), os.environ.get("PYTHONPATH", "")])
        server = Server((), {"PYTHONPATH": path, "LOOPUS_CLOCK": str(jumps)})
        run(server, lambda s: faults.jumping(s, seconds, checked, seed))


@app.command()
def huge(tokens: Annotated[int, typer.Option(help="Entries of each.")] = 100_000) -> None:
    """Bodies with prompts and lists of 100,000 entries."""
    run(Server(), lambda s: bodies.refused(s.address, tokens))


if __name__ == "__main__":
    app()
