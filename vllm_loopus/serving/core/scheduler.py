"""vLLM's scheduler for sequences that may run in a step and get no token from it."""

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from vllm_loopus.serving.core.admission import knobs_of, parse_knobs, salt_with_knobs
from vllm_loopus.serving.core.kv_manager import DepthKVCacheManager
from vllm_loopus.serving.core.step_clock import StepClock
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.knobs.request import RequestKnobs
from vllm_loopus.serving.messages import exit_depths
from vllm_loopus.serving.messages.progress import LoopProgress
from vllm_loopus.serving.messages.stats import LoopStats
from vllm_loopus.serving.messages.step_input import LoopSchedule
from vllm_loopus.serving.model.kv_layout import sequences_that_fit

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


logger = init_logger("vllm.loopus")


class LoopUSScheduler(Scheduler):
    """Schedules like vLLM. A request that got no token is scheduled again at the same position.

    It keeps its place in `running`, its blocks and its priority. In every step each sequence in
    flight gets a share of the rows, the longest waiting first (`step/run.py`), so none starves.
    """

    kv_cache_manager: DepthKVCacheManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = self.vllm_config.model_config.hf_config
        self._options = EngineOptions.of(self.vllm_config.additional_config)
        DepthKVCacheManager.adopt(
            self.kv_cache_manager,
            budget=self._planes_of,
            row_budget=self.scheduler_config.max_num_batched_tokens,
        )
        self._clock = StepClock()
        self._stats = LoopStats()
        self._refused: dict[str, str] = {}  # requests with impossible knobs, and why

    def blocks_by_depth(self) -> list[int]:
        """Blocks that sequences hold at each depth, shared ones counted once."""
        return self.kv_cache_manager.blocks_by_depth()

    @property
    def mean_planes(self) -> float | None:
        """The blocks that sequences ended up with for each block of depth 1, recent sequences
        counting more; None before one has finished."""
        return self.kv_cache_manager.demand.mean_planes

    def sequences_that_fit(self) -> dict[str, float]:
        """How many sequences of the greatest length the pool holds: at `full` depth, and at the
        depth `observed` of those that have finished."""
        full = self._config.max_loops
        planes = {"full": full, "observed": self.mean_planes or full}
        pool = self.kv_cache_config.num_blocks, self.block_size, self.max_model_len
        return {of: sequences_that_fit(*pool, number) for of, number in planes.items()}

    @property
    def hits_by_depth(self) -> list[int]:
        """Positions that requests found in the prefix cache so far, at each depth."""
        return self.kv_cache_manager.hits_by_depth

    def _planes_of(self, request: "Request") -> int:
        return self._options.planes(knobs_of(request).max_loops, self._config.max_loops)

    def add_request(self, request: "Request") -> None:
        """As in vLLM. A request with impossible knobs, which the front end should have refused,
        ends with an error; others do not notice."""
        if request.request_id not in self.requests:  # else the next input of a session
            self._admit(request)
        super().add_request(request)

    def _admit(self, request: "Request") -> None:
        reason = parse_knobs(request, self._config)
        if self._options.last_exited:
            salt_with_knobs(request)
        if reason is not None:
            self._refused[request.request_id] = reason
            self._end_with_error(request.request_id, reason)

    def _end_with_error(self, request_id: str, reason: str) -> None:
        """vLLM finishes it with an error after the step."""
        logger.error("Request %s failed: %s", request_id, reason)
        self.grammar_compile_error_reqs.add(request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> "SchedulerOutput":
        self._clock.begin()
        output = super().schedule(*args, **kwargs)
        LoopSchedule(
            offer=self.kv_cache_manager.offer(output.num_scheduled_tokens),
            costs=self._clock.costs(),
            knobs=self._knobs_of_starting(output),
        ).send_with(output)
        return output

    def _knobs_of_starting(self, output: "SchedulerOutput") -> Mapping[str, RequestKnobs]:
        """Of the requests that the worker does not know, or has forgotten after a preemption."""
        starting = [new.req_id for new in output.scheduled_new_reqs]
        starting += output.scheduled_cached_reqs.resumed_req_ids
        return {request_id: knobs_of(self.requests[request_id]) for request_id in starting}

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: Any
    ) -> Any:
        """As in vLLM, for the requests that got a token.

        Raises `RuntimeError` for the output of a runner that knows no loop.
        """
        progress: LoopProgress | None = getattr(model_runner_output, "loop", None)
        if progress is None:
            raise RuntimeError(
                "LoopUSScheduler got a step of a worker that is not LoopUSWorker; do not set "
                "worker_cls, or set scheduler_cls to vLLM's scheduler too"
            )
        emitting = {
            request_id: scheduled
            for request_id, scheduled in scheduler_output.num_scheduled_tokens.items()
            if self._take_in(request_id, scheduled, progress)
        }
        self._stats.add(progress.stats)
        visible = copy(scheduler_output)
        visible.num_scheduled_tokens = emitting
        outputs = super().update_from_output(visible, model_runner_output)
        if not self.log_stats:  # statistics are not logged
            self._stats = LoopStats()
        self._clock.end(progress, idle=not self.has_requests())
        for of_client in outputs.values():
            for output in of_client.outputs:
                self._complete(output, progress)
        if self._refused:
            running = self._refused.keys() & self.requests.keys()
            self._refused = {name: self._refused[name] for name in running}
        return outputs

    def _take_in(self, request_id: str, scheduled: int, progress: LoopProgress) -> bool:
        """Books what a step did for a request; whether it has a token for it."""
        manager = self.kv_cache_manager
        request = self.requests.get(request_id)
        runs = request is not None and request.status == RequestStatus.RUNNING
        manager.book(request_id, progress.taken.get(request_id, ()), runs)
        failed = request_id in progress.failed
        if failed and runs:
            self._end_with_error(request_id, progress.failed[request_id])
        elif runs:
            in_flight = request_id in progress.in_flight
            manager.note(request_id, progress.wanted.get(request_id, 0), in_flight)
            manager.publish(request, progress.complete[request_id])
        if request_id in progress.exit_depths and request_id not in self._refused:
            if runs:
                self._stats.exit_depths.append(progress.exit_depths[request_id])
            return True
        if request is not None:
            request.num_in_flight_tokens -= scheduled
            if runs and not failed and request_id in progress.in_flight:
                # It needs one token of the next schedule's budget, though it begins nothing.
                request.num_computed_tokens = request.num_tokens - 1
            elif runs and not failed and request_id in progress.computed:
                request.num_computed_tokens = progress.computed[request_id]
        return False

    def _complete(self, output: Any, progress: LoopProgress) -> None:
        """Adds to an output of vLLM's the exit depth of its token, or why its request failed."""
        name = output.request_id
        if output.finish_reason == FinishReason.ERROR:
            output.stop_reason = progress.failed.get(name) or self._refused.get(name)
        if output.new_token_ids:
            exit_depths.send(output, progress.exit_depths[name])

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, with what the loop did since they were made last."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._stats.blocks = self.blocks_by_depth()
            self._stats.sequences = self.sequences_that_fit()
            self._stats.send_with(stats)
            self._stats = LoopStats()
        return stats

    def _handle_stopped_request(self, request: "Request") -> bool:
        """As in vLLM. A session that waits for input holds no blocks: requests that run, whose
        deep planes grow, could not take them from it."""
        finished = super()._handle_stopped_request(request)
        if request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            self.kv_cache_manager.free(request)
        return finished

    def _update_request_as_session(self, session: "Request", update: Any) -> None:
        """Continues a streaming-input session from the positions that are complete at every depth
        in the prefix cache, because the planes of its answers may have gaps."""
        super()._update_request_as_session(session, update)
        self.kv_cache_manager.free(session)
        session.num_computed_tokens = 0
        self._admit(session)
