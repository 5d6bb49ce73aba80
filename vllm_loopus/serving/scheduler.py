"""vLLM's scheduler for sequences that may stay in a step without a token."""

from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_loopus.serving.batch import LoopProgress
from vllm_loopus.serving.costs import COSTS, StepClock
from vllm_loopus.serving.depths import packed
from vllm_loopus.serving.knobs import EngineOptions, RequestKnobs

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


KNOBS_IN_SALT = "|loopus:"  # separates them from the salt that the request came with


class LateKVCacheManager(KVCacheManager):
    """Publishes blocks to the prefix cache when they are computed at every depth, not before.

    vLLM publishes them when it allocates them; here the scheduler does, from the worker's
    watermarks.
    """

    def allocate_slots(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["delay_cache_blocks"] = True
        return super().allocate_slots(*args, **kwargs)


class LoopUSScheduler(Scheduler):
    """Schedules as vLLM does; a request that got no token is scheduled again where it stands.

    Its place in `running`, its blocks and its priority are kept; every step gives each sequence in
    flight at least its turn, the longest waiting first (`step.py`), so nobody starves.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_cache_manager.__class__ = LateKVCacheManager
        self._loopus_config = self.vllm_config.model_config.hf_config
        self._options = EngineOptions.of(self.vllm_config.additional_config)
        self._clock = StepClock()

    def add_request(self, request: "Request") -> None:
        if self._options.takes_over and request.request_id not in self.requests:
            _salt_with_knobs(request, self._loopus_config)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> "SchedulerOutput":
        self._clock.begin()
        output = super().schedule(*args, **kwargs)
        # Measured in one place and sent along: all ranks take the same decisions.
        setattr(output, COSTS, self._clock.costs())
        return output

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: Any
    ) -> Any:
        """As in vLLM; the output of a runner that knows no loop is taken as complete."""
        progress: LoopProgress | None = getattr(model_runner_output, "loop", None)
        if progress is None:
            for request_id in scheduler_output.num_scheduled_tokens:
                request = self.requests.get(request_id)
                if request is not None and request.status == RequestStatus.RUNNING:
                    self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)
            return super().update_from_output(scheduler_output, model_runner_output)
        leaving = {}
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(request_id)
            runs = request is not None and request.status == RequestStatus.RUNNING
            if runs:
                self.kv_cache_manager.cache_blocks(request, progress.complete[request_id])
            if request_id in progress.exit_depths:
                leaving[request_id] = scheduled
            elif request is not None:
                request.num_in_flight_tokens -= scheduled
                if runs:
                    request.num_computed_tokens = progress.computed[request_id]
        visible = copy(scheduler_output)
        visible.num_scheduled_tokens = leaving
        outputs = super().update_from_output(visible, model_runner_output)
        self._clock.end(
            progress.passes, progress.pass_seconds, len(leaving), idle=not self.has_requests()
        )
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.new_token_ids:
                    depth = progress.exit_depths[output.request_id]
                    output.routed_experts = packed(depth)
        return outputs

    def _update_request_as_session(self, session: "Request", update: Any) -> None:
        """A streaming-input session goes on: with what is complete at every depth, from the prefix
        cache, for the planes of its answers may have gaps."""
        super()._update_request_as_session(session, update)
        self.kv_cache_manager.free(session)
        session.num_computed_tokens = 0
        if self._options.takes_over:
            _salt_with_knobs(session, self._loopus_config)


def _salt_with_knobs(request: "Request", config: Any) -> None:
    """In `last_exited` K/V depends on the knobs: give each setting a prefix cache of its own."""
    params = request.sampling_params
    knobs = RequestKnobs.of(params.extra_args if params is not None else None, config)
    suffix = f"{KNOBS_IN_SALT}{knobs}"
    if (request.cache_salt or "").endswith(suffix):  # a session that goes on
        return
    request.cache_salt = f"{request.cache_salt or ''}{suffix}"
    request.block_hashes = []
    request.update_block_hashes()
