"""What an environment with only the serving dependencies can do; run by `make test-install`.

It runs with that environment's Python, which has no pytest: `loopus-tiny` offline and over HTTP,
and a tool that is not installed says so.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

TOOLS = ("accelerate", "datasets", "lm_eval", "matplotlib", "pytest", "ray", "scipy")
BIN = Path(sys.executable).parent
PORT = 8731
QUESTIONS = {"3+2*3=": "5", "a:ab,bc=": "c"}  # of the README; the calculator goes left to right
START = 300  # seconds


def tools_are_absent() -> None:
    present = [name for name in TOOLS if find_spec(name)]
    assert not present, f"not a serving-only environment: {present}"


def answers_offline() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM("loopus-tiny", max_model_len=64, enforce_eager=True)
    outputs = llm.generate(list(QUESTIONS), SamplingParams(temperature=0, max_tokens=4))
    assert [output.outputs[0].text for output in outputs] == list(QUESTIONS.values())
    llm.llm_engine.engine_core.shutdown()


def ask(question: str) -> str:
    body = {"model": "loopus-tiny", "temperature": 0,
            "messages": [{"role": "user", "content": question}]}  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


def answers_over_http() -> None:
    command = [BIN / "vllm", "serve", "loopus-tiny", "--host", "127.0.0.1", "--port", str(PORT),
               "--max-model-len", "64", "--enforce-eager"]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START
        while not healthy():
            assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(1)
        assert {question: ask(question) for question in QUESTIONS} == QUESTIONS
    finally:
        server.terminate()
        server.wait(timeout=60)


def healthy() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def a_missing_tool_is_named() -> None:
    result = subprocess.run(
        [BIN / "vllm-loopus", "recast", "loopus-tiny-base", "--out", "nowhere"],
        capture_output=True,
        text=True,
    )
    assert result.returncode and "pip install" in result.stderr, result.stderr


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    for check in (tools_are_absent, a_missing_tool_is_named, answers_offline, answers_over_http):
        check()
        print(f"ok: {check.__name__.replace('_', ' ')}", flush=True)
