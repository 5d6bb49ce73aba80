"""Rows of the input: read, told apart and checked before an engine starts.

A row is a JSON object in one of three forms:

1. `{"prompt": ...}`: a body of `/v1/completions`;
2. `{"messages": [...]}`: a body of `/v1/chat/completions`;
3. `{"custom_id", "method", "url", "body"}`: what `vllm run-batch` and OpenAI's batch API take.

Fields are vLLM's own, checked by its own models; knobs of the loop stand beside them or in
`vllm_xargs`. What would have no effect here is refused, also where vLLM would ignore it.
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

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.knobs.names import REQUEST_KNOBS
from vllm_loopus.serving.knobs.request import check_request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OPENAI_FIELDS = ("custom_id", "method", "url", "body")
OWN_FIELDS = ("custom_id", "metadata")  # of the first two forms: given back with the answer
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
# Arguments of the tokenizer's function that are no variables of the template: vLLM refuses the
# first two; the batch gives the others itself, or would get something else back.
NOT_OF_THE_TEMPLATE = ("chat_template", "tokenize", "conversation", "return_dict", "return_tensors")
ONLY: dict[str, Any] = {"n": 1, "stream": False}  # what a row of the output has room for


class RowError(ValueError):
    """A row of the input that cannot be: line, field, value and fix."""


@dataclass(frozen=True)
class Limits:
    """What a request is checked against: the engine as it will be served."""

    model_config: ModelConfig
    served_names: tuple[str, ...]
    options: EngineOptions
    sampling_defaults: dict[str, Any]
    has_tokenizer: bool
    has_chat_template: bool

    @property
    def loopus_config(self) -> LoopUSConfig:
        config: LoopUSConfig = self.model_config.hf_config
        return config


@dataclass(frozen=True)
class Row:
    """A checked request.

    - `prompt`: text or token ids, None for a chat; `messages`: of a chat; `template`: arguments
      of the chat template.
    - `sampling_params`: arguments of vLLM's `SamplingParams` that differ from its defaults.
    - `echo`: what the answer says of its request: form, id, metadata.
    """

    index: int
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    template: dict[str, Any]
    sampling_params: dict[str, Any]
    echo: dict[str, Any]


def read_rows(file: Path, limits: Limits) -> Iterator[Row]:
    """The rows of `file` in their order; empty lines are left out.

    Raises `RowError` for the first row that cannot be answered, and for an id that comes twice.
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
                    f"{file}, line {line}: custom_id={name!r} stands in line {first_line[name]} "
                    "too; ids must differ"
                )
            yield row
            index += 1


def parse(given: Any, index: int, limits: Limits) -> Row:
    """Raises `ValueError` or vLLM's client error naming the field, its value and the fix."""
    if not isinstance(given, dict):
        raise ValueError(f"{_shown(given)} is no JSON object; give one with prompt or messages")
    url, body, echo = _form_of(given)
    xargs = body.get("vllm_xargs") or {}
    if not isinstance(xargs, dict):
        raise ValueError(f"vllm_xargs={_shown(xargs)} must be an object")
    beside = {name: body[name] for name in REQUEST_KNOBS if name in body}
    if beside and echo["form"] == "openai":
        raise ValueError(f"{next(iter(beside))} is no field of the body; put it into vllm_xargs")
    if twice := [name for name in beside if name in xargs]:
        raise ValueError(f"{twice[0]} stands beside vllm_xargs and in it; give it once")
    knobs = {**xargs, **beside}
    body = {name: value for name, value in body.items() if name not in beside}
    for name, value in body.items():
        if name not in FIELDS[url]:
            raise ValueError(f"{name}={_shown(value)} is no field of a row here; {_fix(name, url)}")
    for name, only in ONLY.items():
        if body.get(name) not in (None, only):
            raise ValueError(f"{name}={_shown(body[name])} must be {json.dumps(only)} here")
    structured = body.get("structured_outputs")
    if not isinstance(structured, dict | None):  # vLLM's own check stumbles over it
        raise ValueError(f"structured_outputs={_shown(structured)} must be an object")
    if body.get("model") not in (None, *limits.served_names):
        raise ValueError(
            f"model={_shown(body['model'])} is not served; leave it out or say "
            f"{limits.served_names[0]!r}"
        )
    # The knobs are looked at as they were sent: parsing would make 1 of `true`.
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
    fields = vars(request)  # asking for max_tokens of a chat warns that it is old
    most = fields["max_tokens"]
    if fields.get("max_completion_tokens") is not None:
        most = fields["max_completion_tokens"]
    if most is not None and most < 1:
        raise ValueError(f"max_tokens={most} must be 1 or more")
    template = dict(body.get("chat_template_kwargs") or {})
    if theirs := [name for name in NOT_OF_THE_TEMPLATE if name in template]:
        raise ValueError(
            f"chat_template_kwargs has {theirs[0]}={_shown(template[theirs[0]])}, which is no "
            "variable of the template; leave it out"
        )
    check_request(knobs, limits.loopus_config, most, limits.model_config.max_model_len)
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
        raise ValueError(f"{_shown(raw.decode(errors='replace').strip())} is no JSON") from error
    try:
        whole.encode()
    except UnicodeEncodeError as error:
        # JSON may escape half of a pair, for which UTF-8 has no bytes: the answer could not repeat
        # it, nor vLLM read it.
        half = error.object[error.start]
        raise ValueError(
            f"{_place_of(half, row)} has {half!r}, half of a surrogate pair and no character; "
            "leave it out or give the pair"
        ) from None
    return row


def _place_of(text: str, value: Any, name: str = "") -> str | None:
    """The field of a row that has `text` in it, and its value."""
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
    """The endpoint, the body, and what the answer repeats."""
    if "body" in given or "url" in given:
        for name in given:
            if name not in OPENAI_FIELDS:
                raise ValueError(f"{name} is no field beside body; put it into body")
        if not isinstance(given.get("url"), str) or given["url"] not in FIELDS:
            raise ValueError(
                f"url={_shown(given.get('url'))} is not answered; there are {', '.join(FIELDS)}"
            )
        if given.get("method", "POST") != "POST":
            raise ValueError(f"method={_shown(given['method'])} must be POST")
        if not isinstance(given.get("custom_id"), str):
            raise ValueError(f"custom_id={_shown(given.get('custom_id'))} must be a text")
        if not isinstance(given.get("body"), dict):
            raise ValueError(f"body={_shown(given.get('body'))} must be an object")
        echo = {"form": "openai", "url": given["url"], "custom_id": given["custom_id"]}
        return given["url"], given["body"], echo
    if ("prompt" in given) == ("messages" in given):
        raise ValueError(f"{_shown(given)} must have one of prompt and messages")
    echo = {name: given[name] for name in OWN_FIELDS if name in given}
    if not isinstance(echo.get("custom_id", ""), str):
        raise ValueError(f"custom_id={_shown(echo['custom_id'])} must be a text")
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
        f"prompt={_shown(prompt)} must be a text, or a list of token ids from 0 to {size - 1}; "
        "neither may be empty, and a row has one prompt"
    )


def _messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    """With contents as texts, parts of text joined by new lines as in vLLM."""
    if not limits.has_chat_template:
        raise ValueError("messages need a chat template, which this model has not; give prompt")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages={_shown(messages)} must be a list with a message in it")
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
                raise ValueError(f"messages[{place}].content={_shown(content)} must be text alone")
            for part in content:
                if not isinstance(part.get("text"), str):
                    raise ValueError(
                        f"messages[{place}].content has {_shown(part)}, whose text must be a text"
                    )
            content = "\n".join(part["text"] for part in content)
        plain.append({**message, "content": content})
    return plain


def _arguments(params: Any) -> dict[str, Any]:
    """Those of `SamplingParams` that are not at their defaults; output kind and privates aside."""
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
    return f"put what is yours into metadata; there are {known}"


def _shown(value: Any) -> str:
    shown = value if isinstance(value, str) else repr(value)
    return repr(shown[:100] + "...") if len(shown) > 100 else repr(value)
