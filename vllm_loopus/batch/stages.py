"""What Ray's map tasks run before and after the engine. It does not import vLLM, whose import would
take each task's process ten seconds."""

import json
from collections import UserDict
from functools import lru_cache
from typing import Any

from vllm_loopus.serving.messages.exit_depths import exit_depths_in

FAILED = "__inference_error__"  # Ray's column with the error of a failed row, else empty


class Arguments(UserDict[str, Any]):
    """Arguments of `SamplingParams`. Not a dict, because in a column of dicts Arrow would give each
    row the keys of all rows, with None for missing values."""


class Prepare:
    """Converts a checked row, as JSON, to the input of the engine stage."""

    def __init__(self, tokenizer: str, trust_remote_code: bool) -> None:
        self._tokenizer = tokenizer, trust_remote_code

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        request = json.loads(row["request"])
        prepared = {FAILED: "", "sampling_params": Arguments(_whole_keys(request))}
        if isinstance(request["prompt"], str):
            return {**prepared, "prompt": request["prompt"]}
        if request["prompt"] is not None:
            return {**prepared, "tokenized_prompt": request["prompt"]}
        try:
            token_ids = _tokenizer(*self._tokenizer).apply_chat_template(
                request["messages"], tokenize=True, return_dict=False, **request["template"]
            )
        except Exception as error:  # templates raise many types
            return {FAILED: f"the chat template refused the messages: {error}"}
        return {**prepared, "tokenized_prompt": list(token_ids)}


def result_of(row: dict[str, Any]) -> dict[str, Any]:
    """The result of a row that the engine has answered."""
    metrics = row["metrics"] or {}
    result = {
        "text": row["generated_text"],
        "tokens": [int(token) for token in row["generated_tokens"]],
        "prompt_tokens": int(row["num_input_tokens"]),
        "exit_depths": [int(depth) for depth in exit_depths_in(metrics)],
        "finish_reason": metrics["finish_reason"],
        "stop_reason": metrics["stop_reason"],
    }
    return {"index": row["index"], "echo": row["echo"], "result": json.dumps(result)}


def _whole_keys(request: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters with integer keys in `logit_bias`, which JSON turns into strings."""
    params = dict(request["sampling_params"])
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): v for token, v in params["logit_bias"].items()}
    return params


@lru_cache(maxsize=1)
def _tokenizer(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
