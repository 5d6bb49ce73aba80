"""Builds the rows of the output: the answer to a request, or its error."""

import time
import uuid
from collections.abc import Mapping
from typing import Any

from vllm_loopus.batch.rows import CHAT
from vllm_loopus.serving.frontend.answers import depth_fields


def answer(index: int, echo: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """The output row of a request that was answered.

    `echo`: see `Row`. `result`: `text`, `finish_reason`, `exit_depths`, `prompt_tokens` and
    `tokens` (ids). Requests in OpenAI's form get the format of `vllm run-batch`, with exit depths
    in the choice.
    """
    depths = depth_fields(list(result["exit_depths"]))
    if echo["form"] != "openai":
        return {
            **_named(index, echo),
            "text": result["text"],
            "token_ids": list(result["tokens"]),
            "finish_reason": result["finish_reason"],
            **depths,
            "prompt_tokens": result["prompt_tokens"],
            "completion_tokens": len(result["tokens"]),
            "error": None,
        }
    chat = echo["url"] == CHAT
    content = (
        {"message": {"role": "assistant", "content": result["text"]}}
        if chat
        else {"text": result["text"]}
    )
    request_id = f"batch-{uuid.uuid4().hex}"
    prompt, completion = result["prompt_tokens"], len(result["tokens"])
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": result["model"],
        "choices": [{"index": 0, **content, "finish_reason": result["finish_reason"], **depths}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        },
    }
    return {
        "id": request_id,
        "custom_id": echo["custom_id"],
        "response": {"status_code": 200, "request_id": request_id, "body": body},
        "error": None,
    }


def failure(index: int, echo: Mapping[str, Any], message: str) -> dict[str, Any]:
    """The output row of a request that failed, with its error."""
    error = {"message": message}
    if echo["form"] != "openai":
        return {**_named(index, echo), "error": error}
    return {
        "id": f"batch-{uuid.uuid4().hex}",
        "custom_id": echo["custom_id"],
        "response": None,
        "error": error,
    }


def _named(index: int, echo: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": index, **{n: echo[n] for n in ("custom_id", "metadata") if n in echo}}
