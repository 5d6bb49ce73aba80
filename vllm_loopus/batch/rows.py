"""Reads and checks the rows of the input before an engine starts.

A row is a request, a JSON object in one of three forms:

1. `{"prompt": ...}`: a body of `/v1/completions`;
2. `{"messages": [...]}`: a body of `/v1/chat/completions`;
3. `{"custom_id", "method", "url", "body"}`: the format of `vllm run-batch` and OpenAI's batch API.

Fields are those of vLLM and checked by vLLM's models. Loop knobs are given beside them or in
`vllm_xargs`. Fields without effect are refused, even if vLLM would ignore them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel, ValidationError
from vllm.config import ModelConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMClientError

from vllm_loopus.architectures import LoopedConfig
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.knobs.names import REQUEST_KNOBS
from vllm_loopus.serving.knobs.request import check_request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OPENAI_FIELDS = ("custom_id", "method", "url", "body")
OWN_FIELDS = ("custom_id", "metadata")  # of the first two forms; returned with the answer
SAMPLING = (
    *("model", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
    *("stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "bad_words"),
    *("allowed_token_ids", "skip_special_tokens", "spaces_between_special_tokens"),
    *("response_format", "structured_outputs", "user", "n", "stream", "vllm_xargs"),
)
OF_CHAT = (
    *("messages", "max_completion_tokens", "reasoning_effort", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message"),
)
FIELDS = {COMPLETIONS: ("prompt", *SAMPLING), CHAT: (*OF_CHAT, *SAMPLING)}
# Arguments of `apply_chat_template` that are not variables of the template. vLLM refuses the first
# two; the others are set by the batch or would change the type of the result.
NOT_OF_THE_TEMPLATE = ("chat_template", "tokenize", "conversation", "return_dict", "return_tensors")
ONLY: dict[str, Any] = {"n": 1, "stream": False}  # the only values that the output supports


class RowError(ValueError):
    """A row of the input is invalid; the message has line, field, value and fix."""


@dataclass(frozen=True)
class Limits:
    """The properties of the engine that requests are checked against."""

    model_config: ModelConfig
    served_names: tuple[str, ...]
    options: EngineOptions
    sampling_defaults: dict[str, Any]
    has_tokenizer: bool
    has_chat_template: bool

    @property
    def looped_config(self) -> LoopedConfig:
        config: LoopedConfig = self.model_config.hf_config
        return config


@dataclass(frozen=True)
class Row:
    """A checked request.

    - `prompt`: text or token ids, None for a chat. `messages`: of a chat. `template`: arguments of
      the chat template.
    - `sampling_params`: arguments of vLLM's `SamplingParams` that differ from its defaults.
    - `echo`: form, id and metadata of the request, for its answer.
    """

    index: int
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    template: dict[str, Any]
    sampling_params: dict[str, Any]
    echo: dict[str, Any]


def read_rows(file: Path, limits: Limits) -> Iterator[Row]:
    """The rows of `file` in order, without empty lines.

    Raises `RowError` for the first invalid row or duplicate id.
    """
    first_line: dict[str, int] = {}
    index = 0
    with file.open("rb") as lines:
        for line, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                row = parse(_json_of(raw), index, limits)
            except (VLLMClientError, ValueError) as error:
                raise RowError(f"{file}, line {line}: {error}") from error
            name = row.echo.get("custom_id")
            if name is not None and first_line.setdefault(name, line) != line:
                raise RowError(
                    f"{file}, line {line}: custom_id={name!r} is also in line {first_line[name]}; "
                    "give each row its own id"
                )
            yield row
            index += 1


def parse(given: Any, index: int, limits: Limits) -> Row:
    """Checks one row. Raises `ValueError` or vLLM's client error with field, value and fix."""
    if not isinstance(given, dict):
        raise ValueError(f"{_shown(given)} is not a JSON object; give one with prompt or messages")
    url, body, echo = _form_of(given)
    xargs = body.get("vllm_xargs") or {}
    if not isinstance(xargs, dict):
        raise ValueError(f"vllm_xargs={_shown(xargs)} must be a JSON object")
    beside = {name: body[name] for name in REQUEST_KNOBS if name in body}
    if beside and echo["form"] == "openai":
        raise ValueError(f"{next(iter(beside))} is not a field of the body; put it into vllm_xargs")
    if twice := [name for name in beside if name in xargs]:
        raise ValueError(f"{twice[0]} is given both in vllm_xargs and beside it; give it once")
    knobs = {**xargs, **beside}
    body = {name: value for name, value in body.items() if name not in beside}
    for name, value in body.items():
        if name not in FIELDS[url]:
            raise ValueError(f"{name}={_shown(value)} is not a field of a row; {_fix(name, url)}")
    for name, only in ONLY.items():
        if body.get(name) not in (None, only):
            raise ValueError(f"{name}={_shown(body[name])} must be {json.dumps(only)} in a batch")
    structured = body.get("structured_outputs")
    if not isinstance(structured, dict | None):  # vLLM's check fails with another error
        raise ValueError(f"structured_outputs={_shown(structured)} must be a JSON object")
    if body.get("model") not in (None, *limits.served_names):
        raise ValueError(
            f"model={_shown(body['model'])} is not served; leave it out or give "
            f"{limits.served_names[0]!r}"
        )
    # Knobs are checked as sent, because parsing would convert `true` to 1.
    effort = body.get("reasoning_effort")
    budgets = limits.options.reasoning_effort
    if isinstance(effort, str) and effort in budgets and "max_loops" not in knobs:
        knobs["max_loops"] = budgets[effort]
    prompt, messages = None, None
    if url == CHAT:
        messages = _messages(body.get("messages"), limits)
    else:
        prompt = _prompt(body.get("prompt"), limits)
    request = _parsed(url, {**body, "vllm_xargs": knobs or None})
    fields = vars(request)  # the attribute max_tokens of a chat is deprecated and would warn
    most = fields["max_tokens"]
    if fields.get("max_completion_tokens") is not None:
        most = fields["max_completion_tokens"]
    if most is not None and most < 1:
        raise ValueError(f"max_tokens={most} must be 1 or more")
    template = dict(body.get("chat_template_kwargs") or {})
    if theirs := [name for name in NOT_OF_THE_TEMPLATE if name in template]:
        raise ValueError(
            f"chat_template_kwargs has {theirs[0]}={_shown(template[theirs[0]])}, which is not a "
            "variable of the template; leave it out"
        )
    check_request(knobs, limits.looped_config, most, limits.model_config.max_model_len)
    params = request.to_sampling_params(most, limits.sampling_defaults)
    params.extra_args = knobs or None
    if url == CHAT:
        if effort is not None:
            template["reasoning_effort"] = effort
        for name in ("add_generation_prompt", "continue_final_message"):
            template[name] = fields[name]
    return Row(index, prompt, messages, template, _arguments(params), echo)


def _json_of(raw: bytes) -> Any:
    try:
        row = json.loads(raw)
        whole = json.dumps(row, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        shown = _shown(raw.decode(errors="replace").strip())
        raise ValueError(f"{shown} is not JSON; give one JSON object per line") from error
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which UTF-8 cannot encode.
        half = error.object[error.start]
        raise ValueError(
            f"{_place_of(half, row)} has {half!r}, half of a surrogate pair, which is not a "
            "character; leave it out or give the pair"
        ) from None
    return row


def _place_of(text: str, value: Any, name: str = "") -> str | None:
    """The field of a row that contains `text`, with its value."""
    if isinstance(value, str):
        return f"{name}={_shown(value)}" if text in value else None
    if isinstance(value, dict):
        parts = [(f"{name}.{key}" if name else key, key, part) for key, part in value.items()]
        if named := next((key for _, key, _ in parts if text in key), None):
            return f"the name {named!r}"
        return next(filter(None, (_place_of(text, part, path) for path, _, part in parts)), None)
    if isinstance(value, list):
        places = (_place_of(text, part, f"{name}[{place}]") for place, part in enumerate(value))
        return next(filter(None, places), None)
    return None


def _form_of(given: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The endpoint, the body, and the `echo` of a row."""
    if "body" in given or "url" in given:
        for name in given:
            if name not in OPENAI_FIELDS:
                raise ValueError(f"{name} is not a field beside body; put it into body")
        if not isinstance(given.get("url"), str) or given["url"] not in FIELDS:
            raise ValueError(
                f"url={_shown(given.get('url'))} is not supported; give one of {', '.join(FIELDS)}"
            )
        if given.get("method", "POST") != "POST":
            raise ValueError(f"method={_shown(given['method'])} must be POST")
        if not isinstance(given.get("custom_id"), str):
            raise ValueError(f"custom_id={_shown(given.get('custom_id'))} must be a string")
        if not isinstance(given.get("body"), dict):
            raise ValueError(f"body={_shown(given.get('body'))} must be a JSON object")
        echo = {"form": "openai", "url": given["url"], "custom_id": given["custom_id"]}
        return given["url"], given["body"], echo
    if ("prompt" in given) == ("messages" in given):
        raise ValueError(f"{_shown(given)} must have one of prompt and messages")
    echo = {name: given[name] for name in OWN_FIELDS if name in given}
    if not isinstance(echo.get("custom_id", ""), str):
        raise ValueError(f"custom_id={_shown(echo['custom_id'])} must be a string")
    body = {name: value for name, value in given.items() if name not in OWN_FIELDS}
    return CHAT if "messages" in given else COMPLETIONS, body, {"form": "plain", **echo}


def _parsed(url: str, body: dict[str, Any]) -> Any:
    kind: type[BaseModel] = ChatCompletionRequest if url == CHAT else CompletionRequest
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:3])
        raise ValueError(f"{where}={_shown(first.get('input'))}: {first['msg']}") from error


def _prompt(prompt: Any, limits: Limits) -> str | list[int]:
    if isinstance(prompt, str) and prompt:
        if not limits.has_tokenizer:
            raise ValueError(f"prompt={_shown(prompt)} needs a tokenizer; give token ids")
        return prompt
    size = limits.model_config.get_vocab_size()
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size for i in prompt)
    ):
        return prompt
    raise ValueError(
        f"prompt={_shown(prompt)} must be a string, or a list of token ids from 0 to {size - 1}, "
        "and not empty; a row has one prompt"
    )


def _messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    """The messages with contents as strings; text parts are joined with newlines as in vLLM."""
    if not limits.has_chat_template:
        raise ValueError("messages need a chat template, but this model has none; give prompt")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages={_shown(messages)} must be a list with at least one message")
    plain = []
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{place}]={_shown(message)} must have a role and a content")
        if not isinstance(message.get("tool_calls"), list | None):
            raise ValueError(
                f"messages[{place}].tool_calls={_shown(message['tool_calls'])} must be a list"
            )
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
                raise ValueError(f"messages[{place}].content={_shown(content)} must be only text")
            for part in content:
                if not isinstance(part.get("text"), str):
                    raise ValueError(
                        f"messages[{place}].content has {_shown(part)}, whose text must be a string"
                    )
            content = "\n".join(part["text"] for part in content)
        plain.append({**message, "content": content})
    return plain


def _arguments(params: Any) -> dict[str, Any]:
    """The public arguments of `SamplingParams` that differ from their defaults."""
    defaults = msgspec.structs.asdict(type(params)())
    given = {
        name: value
        for name, value in msgspec.structs.asdict(params).items()
        if not name.startswith("_")
        and name not in ("output_kind", "skip_clone", "output_text_buffer_length")
        and value != defaults[name]
    }
    structured = given.get("structured_outputs")
    if is_dataclass(structured) and not isinstance(structured, type):
        given["structured_outputs"] = {
            name: value
            for name, value in asdict(structured).items()
            if not name.startswith("_") and value is not None
        }
    return given


def _fix(name: str, url: str) -> str:
    if name in ("id", "request_id"):
        return "call it custom_id"
    known = ", ".join((*FIELDS[url], *REQUEST_KNOBS))
    return f"put your own fields into metadata; known fields are {known}"


def _shown(value: Any) -> str:
    shown = value if isinstance(value, str) else repr(value)
    return repr(shown[:100] + "...") if len(shown) > 100 else repr(value)
