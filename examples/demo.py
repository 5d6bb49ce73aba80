"""Offline generation with `LLM`, then a real `vllm serve` that answers a chat request.

Run by `make demo`. Needs vLLM and the extra `bench` of the package. The model is embedded in it.
"""

import json
import os
import urllib.request
from typing import Any

MODEL = "loopus-tiny"
SECONDS_TO_END = (
    60  # at most; vLLM would kill its processes at once, with warnings of what they left
)
# Only errors: what vLLM and torch say otherwise is in docs/troubleshooting.md.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_LOGS", "-torch._library.triton")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def generate_offline() -> None:
    from vllm import LLM, SamplingParams

    from vllm_loopus.tiny.tasks import evaluation_set

    items = evaluation_set(seed=1, per_difficulty=1)
    print(f"{MODEL}: offline generation", flush=True)
    llm = LLM(MODEL, max_model_len=256, use_tqdm_on_load=False)
    prompts = [item.question for item in items]
    params = SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for item, output in zip(items, outputs, strict=True):
        print(f"  {output.prompt!r} -> {output.outputs[0].text!r} (right: {item.answer!r})")
    llm.llm_engine.engine_core.shutdown(timeout=SECONDS_TO_END)


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
    from vllm_loopus.bench.server import running_server
    from vllm_loopus.tiny.tasks import evaluation_set

    item = next(i for i in evaluation_set(seed=2, per_difficulty=1) if i.task == "arithmetic")
    print(f"\n$ vllm serve {MODEL}", flush=True)
    quiet = ("--no-use-tqdm-on-load", "--uvicorn-log-level", "warning")
    ending = ("--shutdown-timeout", str(SECONDS_TO_END))
    with running_server(MODEL, "--max-model-len", "256", *quiet, *ending) as address:
        answer = ask(address, item.question)
        print(f"  user: {item.question!r}")
        print(f"  {answer['model']}: {answer['choices'][0]['message']['content']!r}")
        print(f"  (right: {item.answer!r}; usage: {answer['usage']})")
    print("  server stopped")


if __name__ == "__main__":
    generate_offline()
    chat_with_server()
