"""Offline generation with `LLM`, then a real `vllm serve` that answers a chat request.

Run by `make demo`. Needs nothing but the installed package: the model is embedded in it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

MODEL = "loopus-tiny"
START_UP_SECONDS = 300
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def generate_offline() -> None:
    from vllm import LLM, SamplingParams

    from vllm_loopus.tiny.tasks import evaluation_set

    items = evaluation_set(seed=1, per_difficulty=1)
    llm = LLM(MODEL, max_model_len=256)
    prompts = [item.question for item in items]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
    print(f"\n{MODEL}: offline generation")
    for item, output in zip(items, outputs, strict=True):
        print(f"  {output.prompt!r} -> {output.outputs[0].text!r} (right: {item.answer!r})")
    llm.llm_engine.engine_core.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(
    *arguments: str, environment: dict[str, str] | None = None, output: IO[str] | None = None
) -> Iterator[str]:
    """`vllm serve *arguments` on a free port of 127.0.0.1; yields its address, stops it after."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
        wait_until_healthy(server, address)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait_until_healthy(
    server: subprocess.Popen[bytes], address: str, seconds: float = START_UP_SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"vllm serve ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"vllm serve was not healthy after {seconds} s")


def ask(address: str, question: str) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 8,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def chat_with_server() -> None:
    from vllm_loopus.tiny.tasks import evaluation_set

    item = next(i for i in evaluation_set(seed=2, per_difficulty=1) if i.task == "arithmetic")
    print(f"\n$ vllm serve {MODEL}", flush=True)
    with running_server(MODEL, "--max-model-len", "256") as address:
        answer = ask(address, item.question)
        print(f"  user: {item.question!r}")
        print(f"  {answer['model']}: {answer['choices'][0]['message']['content']!r}")
        print(f"  (right: {item.answer!r}; usage: {answer['usage']})")
    print("  server stopped")


if __name__ == "__main__":
    generate_offline()
    chat_with_server()
