"""The bodies of requests, as they were sent, at every route of vLLM's API server.

Parsing turns `true` into 1 and drops unknown fields, so a knob in a wrong place would be ignored
without a word. A dependency of the whole app looks at each body before its route is called: knobs
are checked where the route reads them, and refused everywhere else, with the place where they go.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, get_args

from fastapi import Depends
from fastapi.requests import HTTPConnection, Request

from vllm_loopus.architectures import architecture_of
from vllm_loopus.serving.knobs.names import REQUEST_KNOBS, RETURN_EXIT_DEPTHS
from vllm_loopus.serving.knobs.request import KnobError, check_names, check_request

XARGS = "vllm_xargs"
# Parameters of the engine, as they are, with its `extra_args` inside.
SAMPLING, EXTRA = "sampling_params", "extra_args"
# Its request class does not declare `vllm_xargs`, but hands it on to each chat.
HANDS_ON = "BatchChatCompletionRequest"
# Routes whose answers have room for exit depths.
WITH_DEPTHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
LISTED = "/v1/completions, /v1/chat/completions and /v1/responses"
NO_DEPTHS = f"{RETURN_EXIT_DEPTHS} is only supported by {LISTED}"


def check_bodies(app: Any) -> None:
    """Checks the bodies at all routes that are added to a FastAPI app from now on."""
    app.router.dependencies.append(Depends(check_body))


async def check_body(connection: HTTPConnection) -> None:
    """Raises `KnobError` (HTTP 400) for a knob that is wrong, or has no effect where it is."""
    vllm_config = getattr(connection.app.state, "vllm_config", None)
    if vllm_config is None or architecture_of(vllm_config.model_config.hf_config) is None:
        return
    if not isinstance(connection, Request) or not _has_json(connection):
        return
    try:
        body = await connection.json()
    except (ValueError, RecursionError):  # the route says what is wrong with it
        return
    if isinstance(body, Mapping):
        route = connection.scope["route"]
        BodyCheck.of(route.path, route.endpoint)(body, vllm_config.model_config)


def request_classes(endpoint: Callable[..., Any]) -> tuple[type[Any], ...]:
    """The classes that FastAPI parses the body of a route into; none where the route does that."""
    parameters = inspect.signature(endpoint, eval_str=True).parameters.values()
    return tuple(found for p in parameters for found in _models(p.annotation))


def _models(annotation: Any) -> Iterator[type[Any]]:
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        yield annotation
    for inner in get_args(annotation):  # of a union, or of what is annotated
        yield from _models(inner)


def _has_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "").lower()


def put_into_xargs(name: str) -> str:
    """Where a knob goes in most requests."""
    return f'put it into {XARGS}: {{"{XARGS}": {{"{name}": ...}}}}'


def put_into_sampling(name: str) -> str:
    """Where a knob goes in requests with the engine's own parameters."""
    inner = f'{{"{EXTRA}": {{"{name}": ...}}}}'
    return f'put it into {SAMPLING}.{EXTRA}: {{"{SAMPLING}": {inner}}}'


def refuse_misplaced(
    names: Iterable[str], place: Callable[[str], str], custom_processors: bool
) -> None:
    """Raises `KnobError` for knobs, and what looks like one, among names that vLLM would ignore.

    `place`: where a knob goes.
    """
    for name in names:
        if name in REQUEST_KNOBS:
            raise KnobError(f"{name} would be ignored there; {place(name)}", parameter=name)
        check_names([name], custom_processors)


class BodyCheck:
    """Where a route reads knobs, and where it would ignore them."""

    def __init__(self, path: str, classes: tuple[type[Any], ...]) -> None:
        """`classes`: what the body is parsed into. With none, the route hands it to others."""
        self._path = path
        fields = {name for found in classes for name in found.model_fields}
        hands_on = not classes or HANDS_ON in {found.__name__ for found in classes}
        self._takes_xargs = hands_on or XARGS in fields
        self._takes_sampling = SAMPLING in fields
        self._known = fields | {XARGS}
        self._has_depths = path in WITH_DEPTHS or not classes

    @classmethod
    @cache
    def of(cls, path: str, endpoint: Callable[..., Any]) -> "BodyCheck":
        return cls(path, request_classes(endpoint))

    def __call__(self, body: Mapping[str, Any], model: Any) -> None:
        """Raises `KnobError`. `model`: vLLM's model config."""
        custom = bool(model.logits_processors)
        refuse_misplaced((n for n in body if n not in self._known), self._place, custom)
        xargs, sampling = body.get(XARGS), body.get(SAMPLING)
        if self._takes_xargs:
            self._check(xargs, XARGS, model)
        elif isinstance(xargs, Mapping):
            refuse_misplaced(xargs, self._place, custom)
        if self._takes_sampling and isinstance(sampling, Mapping):
            refuse_misplaced((n for n in sampling if n != EXTRA), self._place, custom)
            self._check(sampling.get(EXTRA), f"{SAMPLING}.{EXTRA}", model)

    def _check(self, given: Any, name: str, model: Any) -> None:
        if given is None:
            return
        if not isinstance(given, Mapping):
            raise KnobError(f"{name} must be an object of names and values", parameter=name)
        most = model.max_model_len
        check_request(given, model.hf_config, None, most, bool(model.logits_processors))
        if given.get(RETURN_EXIT_DEPTHS) and not self._has_depths:
            raise KnobError(NO_DEPTHS, parameter=RETURN_EXIT_DEPTHS)

    def _place(self, name: str) -> str:
        if self._takes_xargs:
            return put_into_xargs(name)
        if self._takes_sampling:
            return put_into_sampling(name)
        return f"{self._path} takes no knobs: send it in {XARGS} to {LISTED}"
