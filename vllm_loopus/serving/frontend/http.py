"""The OpenAI server for looped models: it checks knobs before an answer begins, and answers with
exit depths if the request asks for them.

vLLM builds its handlers in `init_generate_state`; `adopt_handlers` changes their classes to ones
mixed here. They see parsed requests, also those that come from a batch file or through Ray Serve.
`bodies.py` has checked the body before, if it came to a route of vLLM's.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_loopus.serving.frontend.answers import DepthRecorder, FailureReason, mark
from vllm_loopus.serving.frontend.bodies import (
    NO_DEPTHS,
    XARGS,
    put_into_xargs,
    refuse_misplaced,
)
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.knobs.names import REQUEST_KNOBS, RETURN_EXIT_DEPTHS, TOKEN_LIMITS
from vllm_loopus.serving.knobs.request import KnobError, LoopDefaults, check_request
from vllm_loopus.serving.messages.exit_depths import exit_depths

if TYPE_CHECKING:
    from fastapi import Request
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
else:
    GenerateBaseServing = object

RECORDER = "_loopus_recorder"  # attribute of a context of the Responses API


class LoopedHandler(GenerateBaseServing):
    """Mixed in before a handler of vLLM's."""

    answers_with_depths = True

    def _init_loop(self, defaults: LoopDefaults, options: EngineOptions) -> None:
        self._loop_defaults = defaults
        self._efforts = options.reasoning_effort

    def admit(self, request: Any, effort: Any = None) -> None:
        """Checks the knobs of a parsed request and applies `reasoning_effort`.

        Raises `KnobError` (HTTP 400), for a stream before its first byte.
        """
        custom_processors = bool(self.model_config.logits_processors)
        extra = [name for name in request.model_extra or () if name != XARGS]
        refuse_misplaced(extra, put_into_xargs, custom_processors)
        # A batch of chats has no such field, but hands it on to each chat.
        given = getattr(request, XARGS, None) or {}
        if isinstance(effort, str) and effort in self._efforts and "max_loops" not in given:
            given = {**given, "max_loops": self._efforts[effort]}
        limits = (getattr(request, name, None) for name in TOKEN_LIMITS)
        check_request(
            given,
            self._loop_defaults,
            next((limit for limit in limits if limit is not None), None),
            self.model_config.max_model_len,
            custom_processors,
        )
        self._refuse_combinations(request, given)
        if given:
            request.vllm_xargs = given

    def _raise_if_error(self, finish_reason: str | None, request_id: str, *more: Any) -> None:
        """As in vLLM (HTTP 500), with the reason if one is known."""
        if isinstance(finish_reason, FailureReason):
            from vllm.exceptions import GenerationError

            raise GenerationError(f"the request failed: {finish_reason.why}")
        super()._raise_if_error(finish_reason, request_id, *more)

    def _refuse_combinations(self, request: Any, given: Mapping[str, Any]) -> None:
        knobs = [
            name
            for name in REQUEST_KNOBS
            if given.get(name) is not None and (given[name] or name != RETURN_EXIT_DEPTHS)
        ]
        if knobs and getattr(request, "use_beam_search", False):
            raise KnobError(
                f"{knobs[0]} has no effect with use_beam_search; remove one", parameter=knobs[0]
            )
        if given.get(RETURN_EXIT_DEPTHS) and not self.answers_with_depths:
            raise KnobError(NO_DEPTHS, parameter=RETURN_EXIT_DEPTHS)


class LoopedCompletion(LoopedHandler):
    """`/v1/completions`: answers with `exit_depths` and `mean_exit_depth` of each choice."""

    async def create_completion(self, request: Any, raw_request: "Request | None" = None) -> Any:
        self.admit(request)
        return await super().create_completion(request, raw_request)

    def request_output_to_completion_response(
        self, final_res_batch: list[Any], request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        response = super().request_output_to_completion_response(
            final_res_batch, request, *args, **kwargs
        )
        if _wants_depths(request):
            outputs = [output for result in final_res_batch for output in result.outputs]
            for choice, output in zip(response.choices, outputs, strict=True):
                mark(choice, exit_depths(output))
        return response

    def completion_stream_generator(
        self, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _wants_depths(request):
            return super().completion_stream_generator(
                request, engine_inputs, result_generator, *args, **kwargs
            )
        recorder, num_choices = DepthRecorder(), request.n or 1

        async def recorded() -> AsyncIterator[Any]:
            async for prompt, result in result_generator:
                recorder.add(result.outputs, first=prompt * num_choices)
                yield prompt, result

        return recorder.stream(
            super().completion_stream_generator(request, engine_inputs, recorded(), *args, **kwargs)
        )


class LoopedChat(LoopedHandler):
    """`/v1/chat/completions`: answers with `exit_depths` and `mean_exit_depth` of each choice."""

    async def create_chat_completion(
        self, request: Any, raw_request: "Request | None" = None
    ) -> Any:
        self.admit(request, getattr(request, "reasoning_effort", None))
        return await super().create_chat_completion(request, raw_request)

    async def chat_completion_full_generator(
        self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        final: list[Any] = []

        async def recorded() -> AsyncIterator[Any]:
            async for result in result_generator:
                final[:] = result.outputs
                yield result

        response = await super().chat_completion_full_generator(
            request, recorded(), *args, **kwargs
        )
        if _wants_depths(request) and hasattr(response, "choices"):
            depths = {output.index: exit_depths(output) for output in final}
            for choice in response.choices:
                mark(choice, depths[choice.index])
        return response

    def chat_completion_stream_generator(
        self, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _wants_depths(request):
            return super().chat_completion_stream_generator(
                request, result_generator, *args, **kwargs
            )
        recorder = DepthRecorder()

        async def recorded() -> AsyncIterator[Any]:
            async for result in result_generator:
                recorder.add(result.outputs)
                yield result

        return recorder.stream(
            super().chat_completion_stream_generator(request, recorded(), *args, **kwargs)
        )


class LoopedOtherChat(LoopedChat):
    """Endpoints built on chat whose answers have no room for exit depths: Anthropic's, Cohere's."""

    answers_with_depths = False


class LoopedChatBatch(LoopedOtherChat):
    """`/v1/chat/completions/batch`."""

    async def create_batch_chat_completion(
        self, request: Any, raw_request: "Request | None" = None
    ) -> Any:
        self.admit(request, getattr(request, "reasoning_effort", None))
        return await super().create_batch_chat_completion(request, raw_request)


class LoopedResponses(LoopedHandler):
    """`/v1/responses`: answers with `exit_depths` and `mean_exit_depth` of the response, all turns
    together."""

    async def create_responses(self, request: Any, raw_request: "Request | None" = None) -> Any:
        effort = getattr(request.reasoning, "effort", None)
        self.admit(request, effort)
        return await super().create_responses(request, raw_request)

    def _generate_with_builtin_tools(
        self, request_id: Any, engine_input: Any, sampling_params: Any, context: Any, **kwargs: Any
    ) -> Any:
        if (sampling_params.extra_args or {}).get(RETURN_EXIT_DEPTHS):
            recorder = DepthRecorder()
            setattr(context, RECORDER, recorder)
            context.append_output = _recording(recorder, context.append_output)
        return super()._generate_with_builtin_tools(
            request_id=request_id,
            engine_input=engine_input,
            sampling_params=sampling_params,
            context=context,
            **kwargs,
        )

    async def responses_full_generator(
        self, request: Any, sampling_params: Any, result_generator: Any, context: Any, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        response = await super().responses_full_generator(
            request, sampling_params, result_generator, context, *args, **kwargs
        )
        recorder: DepthRecorder | None = getattr(context, RECORDER, None)
        if recorder is not None and hasattr(response, "output"):
            mark(response, recorder.depths.get(0, []))
        return response


# Attribute of the server's state -> what is mixed in before its handler.
HANDLERS: dict[str, type[LoopedHandler]] = {
    "openai_serving_completion": LoopedCompletion,
    "openai_serving_chat": LoopedChat,
    "openai_serving_chat_batch": LoopedChatBatch,
    "openai_serving_responses": LoopedResponses,
    "anthropic_serving_messages": LoopedOtherChat,
    "cohere_serving_chat_v2": LoopedOtherChat,
}


def adopt_handlers(vllm_config: Any, state: Any) -> None:
    """Turns the handlers that vLLM has just built for a looped model into ours."""
    config = vllm_config.model_config.hf_config
    options = EngineOptions.of(vllm_config.additional_config)
    for attribute, mixed_in in HANDLERS.items():
        handler = getattr(state, attribute, None)
        if handler is not None:
            kind = type(handler)
            handler.__class__ = type(f"LoopUS{kind.__name__}", (mixed_in, kind), {})
            handler._init_loop(config, options)


def _wants_depths(request: Any) -> bool:
    return bool((request.vllm_xargs or {}).get(RETURN_EXIT_DEPTHS))


def _recording(
    recorder: DepthRecorder, append_output: Callable[[Any], None]
) -> Callable[[Any], None]:
    def record(output: Any) -> None:
        recorder.add(output.outputs)
        append_output(output)

    return record
