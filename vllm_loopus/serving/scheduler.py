"""vLLM's scheduler for sequences that may stay in a step without a token."""

from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from vllm_loopus.serving.batch import LoopProgress
from vllm_loopus.serving.blocks import OFFER
from vllm_loopus.serving.costs import COSTS, StepClock
from vllm_loopus.serving.depths import send
from vllm_loopus.serving.knobs import EngineOptions, RequestKnobs
from vllm_loopus.serving.kv_layout import sequences_that_fit
from vllm_loopus.serving.kv_manager import DepthKVCacheManager
from vllm_loopus.serving.stats import LoopStats

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


logger = init_logger("vllm.loopus")

KNOBS_IN_SALT = "|loopus:"  # separates them from the salt that the request came with


class LoopUSScheduler(Scheduler):
    """Schedules as vLLM does; a request that got no token is scheduled again where it stands.

    Its place in `running`, its blocks and its priority are kept; every step gives each sequence in
    flight at least its turn, the longest waiting first (`step.py`), so nobody starves.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loopus_config = self.vllm_config.model_config.hf_config
        self._options = EngineOptions.of(self.vllm_config.additional_config)
        DepthKVCacheManager.adopt(
            self.kv_cache_manager,
            budget=self._planes_of,
            row_budget=self.scheduler_config.max_num_batched_tokens,
        )
        self._clock = StepClock()
        self._stats = LoopStats()

    kv_cache_manager: DepthKVCacheManager

    def blocks_by_depth(self) -> list[int]:
        """Blocks that sequences hold at each depth, shared ones counted once."""
        return self.kv_cache_manager.blocks_by_depth()

    @property
    def mean_planes(self) -> float | None:
        """Blocks that sequences ended up with for each of depth 1, recent ones counting more; None
        before one has finished."""
        return self.kv_cache_manager.demand.mean_planes

    def sequences_that_fit(self) -> dict[str, float]:
        """How many sequences of the greatest length the pool holds: at `full` depth, and at the one
        `observed` of those that have finished."""
        full = self._loopus_config.max_loops
        planes = {"full": full, "observed": self.mean_planes or full}
        pool = self.kv_cache_config.num_blocks, self.block_size, self.max_model_len
        return {of: sequences_that_fit(*pool, number) for of, number in planes.items()}

    @property
    def hits_by_depth(self) -> list[int]:
        """Positions that requests found in the prefix cache so far, at each depth."""
        return self.kv_cache_manager.hits_by_depth

    def _planes_of(self, request: "Request") -> int:
        knobs = _knobs_of(request, self._loopus_config)
        return self._options.planes(knobs.max_loops, self._loopus_config.max_loops)

    def add_request(self, request: "Request") -> None:
        if self._options.takes_over and request.request_id not in self.requests:
            _salt_with_knobs(request, self._loopus_config)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> "SchedulerOutput":
        self._clock.begin()
        output = super().schedule(*args, **kwargs)
        # Measured in one place and sent along: all ranks take the same decisions.
        setattr(output, COSTS, self._clock.costs())
        setattr(output, OFFER, self.kv_cache_manager.offer(output.num_scheduled_tokens))
        return output

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: Any
    ) -> Any:
        """As in vLLM, for the requests that got a token.

        Raises `RuntimeError` for the output of a runner that knows no loop.
        """
        progress: LoopProgress | None = getattr(model_runner_output, "loop", None)
        if progress is None:
            raise RuntimeError(
                "LoopUSScheduler got a step of a worker that is not LoopUSWorker; leave worker_cls "
                "alone, or set scheduler_cls to vLLM's scheduler too"
            )
        leaving = {}
        manager = self.kv_cache_manager
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(request_id)
            runs = request is not None and request.status == RequestStatus.RUNNING
            manager.book(request_id, progress.taken.get(request_id, ()), runs)
            failed = request_id in progress.failed
            if failed and runs:
                logger.error("Request %s failed: %s", request_id, progress.failed[request_id])
                # vLLM ends those with an error, with the other requests that it cannot go on with.
                self.grammar_compile_error_reqs.add(request_id)
            elif runs:
                manager.note(
                    request_id,
                    wanted=progress.wanted.get(request_id, 0),
                    in_flight=request_id in progress.in_flight,
                )
                manager.publish(request, progress.complete[request_id])
            if request_id in progress.exit_depths:
                leaving[request_id] = scheduled
            elif request is not None:
                request.num_in_flight_tokens -= scheduled
                if failed:
                    continue
                if runs and request_id in progress.in_flight:
                    # One token of the schedule's budget, for it begins nothing.
                    request.num_computed_tokens = request.num_tokens - 1
                elif runs:
                    request.num_computed_tokens = progress.computed[request_id]
        if self.log_stats:  # else nobody takes them
            self._stats.add(progress.stats)
        visible = copy(scheduler_output)
        visible.num_scheduled_tokens = leaving
        outputs = super().update_from_output(visible, model_runner_output)
        self._clock.end(
            progress.passes,
            progress.pass_seconds,
            at_boundary=progress.rows_at_boundary,
            idle=not self.has_requests(),
        )
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.finish_reason == FinishReason.ERROR:
                    output.stop_reason = progress.failed.get(output.request_id)
                if output.new_token_ids:
                    send(output, progress.exit_depths[output.request_id])
        return outputs

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
        """As in vLLM; a session that waits for input holds no blocks: requests that run, whose
        deep planes grow, could not take them from it."""
        finished = super()._handle_stopped_request(request)
        if request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            self.kv_cache_manager.free(request)
        return finished

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
    knobs = _knobs_of(request, config)
    suffix = f"{KNOBS_IN_SALT}{knobs}"
    if (request.cache_salt or "").endswith(suffix):  # a session that goes on
        return
    request.cache_salt = f"{request.cache_salt or ''}{suffix}"
    request.block_hashes = []
    request.update_block_hashes()


def _knobs_of(request: "Request", config: Any) -> RequestKnobs:
    params = request.sampling_params
    return RequestKnobs.of(params.extra_args if params is not None else None, config)
