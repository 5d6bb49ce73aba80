"""Every route of vLLM's API server, as vLLM registers them: it works without knobs, takes them
where this test says, and refuses them everywhere else with the place where they go.

A route or a request class that a new release of vLLM adds fails here until somebody decides.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.asynchronous import run
from tests.serving.conftest import SERVED, scale_out
from tests.serving.test_http import CHAT, COMPLETION, PROMPTS, RESPONSE
from vllm_loopus import LoopUSConfig
from vllm_loopus.cli.info import resolve
from vllm_loopus.plugin import register
from vllm_loopus.serving.frontend.bodies import check_body, request_classes

XARGS, EXTRA, NOWHERE = "vllm_xargs", "sampling_params.extra_args", ""
BESIDE = "beside the prompt"
ANSWER = {"choices": [{"index": 0, "token_ids": [5, 6]}]}
SAMPLING = {"max_tokens": 4, "temperature": 0}
# Request class -> a body, and where knobs go in it.
BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "CompletionRequest": (COMPLETION, XARGS),
    "ChatCompletionRequest": (CHAT, XARGS),
    "BatchChatCompletionRequest": ({**CHAT, "messages": [CHAT["messages"]] * 2}, XARGS),
    "ResponsesRequest": (RESPONSE, XARGS),
    "AnthropicMessagesRequest": (CHAT, XARGS),
    "AnthropicCountTokensRequest": (
        {"model": SERVED, "messages": CHAT["messages"]}, NOWHERE),
    "GenerateRequest": ({"token_ids": [5, 6, 7], "sampling_params": SAMPLING}, EXTRA),
    "GenerativeScoringRequest": (
        {"model": SERVED, "query": "a:ab,", "items": ["bc", "b"], "label_token_ids": [5, 6]},
        NOWHERE),
    "StructuredDecisionRequest": (
        {"model": SERVED, "state": "s", "questions": {"q": {"type": "yes_no"}}}, NOWHERE),
    "TokenizeCompletionRequest": ({"model": SERVED, "prompt": PROMPTS[0]}, NOWHERE),
    "TokenizeChatRequest": ({"model": SERVED, "messages": CHAT["messages"]}, NOWHERE),
    "DetokenizeRequest": ({"model": SERVED, "tokens": [5, 6]}, NOWHERE),
    "DerenderChatRequest": ({"model": SERVED, "generate_response": ANSWER}, NOWHERE),
    "DerenderCompletionRequest": ({"model": SERVED, "generate_responses": [ANSWER]}, NOWHERE),
    "DerenderChatStreamRequest": (
        {"model": SERVED, "stream": True, "generate_chunk": ANSWER}, NOWHERE),
    "DerenderCompletionStreamRequest": (
        {"model": SERVED, "stream": True, "generate_chunk": ANSWER}, NOWHERE),
}  # fmt: skip
# What vLLM answers for models that are not in its own list of such models.
STATUS = {"StructuredDecisionRequest": 501}
# Routes that parse their body themselves. `/invocations` hands it to chat or completions.
RAW = {
    "/invocations": [(COMPLETION, XARGS), (CHAT, XARGS)],
    **dict.fromkeys(
        ("/ping", "/start_profile", "/stop_profile", "/scale_elastic_ep", "/is_scaling_elastic_ep",
         "/inference/v1/abort_requests", "/abort_requests", "/pause", "/resume", "/sleep",
         "/wake_up", "/release_kv_cache_memory", "/reset_prefix_cache", "/reset_mm_cache",
         "/reset_encoder_cache", "/collective_rpc", "/init_weight_transfer_engine",
         "/shutdown_weight_transfer_engine", "/start_weight_update", "/start_draft_weight_update",
         "/update_weights", "/finish_weight_update", "/update_weight_version", "/weight_checker",
         "/v1/responses/{response_id}/cancel"),
        (),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def routes() -> Iterator[list[Any]]:
    """All routes of an app that vLLM builds for a model that generates, development included."""
    from fastapi.routing import APIRoute
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", "m", *scale_out()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        app = build_app(arguments, ("generate",), None)
    yield [route for route in app.routes if isinstance(route, APIRoute)]


def test_every_body_is_checked(routes: list[Any]) -> None:
    around = [
        r.path for r in routes if check_body not in (d.call for d in r.dependant.dependencies)
    ]
    assert len(routes) > 40 and not around


def test_every_route_is_decided(routes: list[Any]) -> None:
    taking = {route.path: request_classes(route.endpoint) for route in routes
              if route.methods & {"POST", "PUT", "PATCH"}}  # fmt: skip
    classes = {found.__name__ for of_route in taking.values() for found in of_route}
    undecided = classes - BODIES.keys()
    assert not undecided, "say in BODIES where their knobs go, or that they have none"
    raw = {path for path, of_route in taking.items() if not of_route}
    assert not raw - RAW.keys(), "say in RAW whether these routes take knobs"


def post(address: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def placed(body: dict[str, Any], knobs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The body with knobs, at every place where somebody might put them."""
    sampling = body.get("sampling_params", {})
    return {
        XARGS: {**body, "vllm_xargs": knobs},
        EXTRA: {**body, "sampling_params": {**sampling, "extra_args": knobs}},
        "sampling_params": {**body, "sampling_params": {**sampling, **knobs}},
        BESIDE: {**body, **knobs},
    }


def check(address: str, path: str, body: dict[str, Any], place: str, plain: int) -> None:
    def answer(sent: dict[str, Any]) -> tuple[int, str]:
        status, content = post(address, path, sent)
        return status, json.dumps(content)

    status, text = answer(body)
    assert status == plain, (path, text)
    for name in placed(body, {}) if SAMPLING in body.values() else (XARGS, BESIDE):
        status, text = answer(placed(body, {"max_loops": 1})[name])
        if name == place:
            assert status == plain, (path, name, text)
        else:
            assert status == 400 and "max_loops" in text, (path, name, text)
            where = place or "takes no knobs: send it in vllm_xargs to /v1/completions"
            assert where in text, (path, name, text)
        status, text = answer(placed(body, {"exit_treshold": 0.5})[name])
        assert status == 400 and "did you mean exit_threshold" in text, (path, name, text)
    if place:
        for knobs, message in (
            ({"max_loops": 99}, "max_loops=99"),
            ({"max_loops": True}, "max_loops=True"),
            ({"exit_depths": [0]}, "exit_depths[0]=0"),
        ):
            status, text = answer(placed(body, knobs)[place])
            assert status == 400 and message in text, (path, knobs, text)
        status, text = answer(placed(body, {"return_exit_depths": 1})[place])
        told = '"mean_exit_depth"' if status == 200 else "is only supported by"
        assert status in (200, 400) and told in text, (path, text)


def test_knobs_at_every_route(routes: list[Any], address: str) -> None:
    seen = 0
    for route in routes:
        cases = [(*BODIES[c.__name__], STATUS.get(c.__name__, 200))
                 for c in request_classes(route.endpoint)]  # fmt: skip
        cases += [(*case, 200) for case in RAW.get(route.path, ())]
        for case in cases:
            check(address, route.path, *case)
            seen += 1
    assert seen > 15


def test_rendered_requests_keep_their_knobs(address: str) -> None:
    body = {**COMPLETION, "vllm_xargs": {"max_loops": 1}}
    status, (rendered,) = post(address, "/v1/completions/render", body)
    assert status == 200 and rendered["sampling_params"]["extra_args"] == {"max_loops": 1}
    assert post(address, "/inference/v1/generate", rendered)[0] == 200


def test_a_batch_of_chats_without_knobs(address: str) -> None:
    """It answers as the chats do alone, with the same efforts and refusals."""
    body, _ = BODIES["BatchChatCompletionRequest"]
    alone = post(address, "/v1/chat/completions", CHAT)[1]["choices"][0]["message"]
    status, answer = post(address, "/v1/chat/completions/batch", body)
    assert status == 200, answer
    assert [choice["message"]["content"] for choice in answer["choices"]] == [alone["content"]] * 2
    for odd in ({"reasoning_effort": ["low"]}, {"vllm_xargs": [1]}, {"vllm_xargs": {"x": {}}}):
        assert post(address, "/v1/chat/completions/batch", {**body, **odd})[0] == 400
    null = {**body, "vllm_xargs": None, "reasoning_effort": "low"}
    assert post(address, "/v1/chat/completions/batch", null)[0] == 200


async def no_body() -> Any:
    raise AssertionError("the body was read")


@pytest.mark.parametrize("looped", [False, True])
def test_requests_to_other_models_are_not_read(looped: bool) -> None:
    from fastapi.requests import Request

    config = LoopUSConfig.from_pretrained(resolve(SERVED)) if looped else LlamaConfig()
    model = SimpleNamespace(hf_config=config)
    state = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
    headers = [(b"content-type", b"application/json")]
    app = SimpleNamespace(state=state)
    request = Request({"type": "http", "app": app, "headers": headers}, no_body)
    if looped:
        with pytest.raises(AssertionError):
            run(check_body(request))
    else:
        run(check_body(request))
