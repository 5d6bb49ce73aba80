"""How the HTTP server ends: by a signal, or because the engine has died."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from vllm.entrypoints.launchers.launcher import NoSignalServer, terminate_if_errored
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tests.asynchronous import run as run_async
from vllm_loopus import LoopUSConfig
from vllm_loopus.plugin import register
from vllm_loopus.serving.http import LoopedHandler

register()


class Engine:
    """What the HTTP server looks at of an engine."""

    is_running = True
    dead_error = EngineDeadError()

    def __init__(self, hf_config: Any) -> None:
        self.errored = False
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))

    def die(self) -> None:
        self.errored, self.is_running = True, False


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    del app.state  # as vLLM's does


async def serve(engine: Engine, *, dies: bool) -> None:
    app = FastAPI(lifespan=lifespan)
    app.state.engine_client = engine
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    config.load()
    server = NoSignalServer(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    engine.die()  # as vLLM marks it when it is shut down, too
    if dies:
        terminate_if_errored(server, engine)
    else:
        task.cancel()
    await task


def test_a_dead_engine_fails_the_server() -> None:
    with pytest.raises(EngineDeadError):
        run_async(serve(Engine(object.__new__(LoopUSConfig)), dies=True))


def test_a_signal_does_not() -> None:
    with pytest.raises(asyncio.CancelledError):
        run_async(serve(Engine(object.__new__(LoopUSConfig)), dies=False))


def test_no_new_requests_while_it_waits_for_the_last_answers() -> None:
    engine: Any = object.__new__(AsyncLLM)
    handler: Any = object.__new__(LoopedHandler)
    handler.engine_client = engine
    engine.shutdown(timeout=1)
    with pytest.raises(GracefulHTTPError, match="shutting down") as caught:
        run_async(handler.admit(None, None))
    assert caught.value.http_status == 503


def test_nor_do_other_models() -> None:
    run_async(serve(Engine(SimpleNamespace()), dies=True))
