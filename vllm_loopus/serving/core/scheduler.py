"""vLLM's scheduler for sequences that may run in a step and get no token from it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from vllm_loopus.architectures import architecture_of
from vllm_loopus.serving.core.admission import knobs_of, parse_knobs, salt
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

# Of a step: the requests that go on by themselves take their part of each. The second one is not in
# every release of the range.
_LIMITS = ("max_num_running_reqs", "max_num_active_reqs", "max_num_scheduled_tokens")


class LoopUSScheduler(Scheduler):
    """Schedules like vLLM, but only requests that need something of the scheduler: prompts, blocks,
    grammars. Others go on by themselves in the worker, through passes and from token to token.

    Where blocks are scarce, all running requests are scheduled, so that vLLM preempts if they do
    not suffice. A request that got no token is then scheduled again at the same position; it keeps
    its place in `running`, its blocks and its priority. In every step each sequence in flight gets
    a share of the rows, the longest waiting first (`step/run.py`), so none starves.
    """

    knows_loops = True  # asked of a scheduler that the user chose
    kv_cache_manager: DepthKVCacheManager
    running: "list[Request]"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = self.vllm_config.model_config.hf_config
        self._options = EngineOptions.of(self.vllm_config.additional_config)
        DepthKVCacheManager.adopt(
            self.kv_cache_manager,
            budget=self._planes_of,
            row_budget=self.scheduler_config.max_num_batched_tokens,
            lookahead=self._options.lookahead,
        )
        architecture = architecture_of(self._config)
        assert architecture is not None
        drawn = architecture.first_state is not None and self._options.draws_noise
        self._own_seed = self.vllm_config.model_config.seed if drawn else None
        self._clock = StepClock()
        self._stats = LoopStats()
        self._progress = LoopProgress()  # of the step that is being booked
        self._refused: dict[str, str] = {}  # requests with impossible knobs, and why
        self._needing: set[str] = set()  # running requests that have to be scheduled
        self._others = 0  # running requests that are hidden from a schedule
        self._dropped: list[str] = []  # requests that wait for input, for the worker to forget

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
        full = self._options.last_plane(self._config.max_loops)
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
        reason = parse_knobs(request, self._config, self._own_seed)
        salt(request, self._options.last_exited)
        if reason is not None:
            self._refused[request.request_id] = reason
            self._end_with_error(request.request_id, reason)

    def _end_with_error(self, request_id: str, reason: str) -> None:
        """vLLM finishes it with an error after the step."""
        logger.error("Request %s failed: %s", request_id, reason)
        self.grammar_compile_error_reqs.add(request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> "SchedulerOutput":
        self._clock.begin()
        everyone = self.pause_state != PauseState.PAUSED_ALL and not self.kv_cache_manager.scarce
        with self._only_those_in_need() if everyone else nullcontext():
            output = super().schedule(*args, **kwargs)
        scheduled = output.num_scheduled_tokens
        if not everyone:
            self._needing.update(request.request_id for request in self.running)
        self._needing = {n for n in self._needing if n in self.requests and n not in scheduled}
        # A grammar only masks the logits of requests that are scheduled.
        everyone = everyone and not any(
            self.requests[name].use_structured_output for name in self._needing
        )
        dropped, self._dropped = self._dropped, []
        LoopSchedule(
            offer=self.kv_cache_manager.offer(),
            costs=self._clock.costs(),
            seconds=self._clock.seconds,
            knobs=self._knobs_of_starting(output),
            everyone=everyone,
            dropped=dropped,
        ).send_with(output)
        if everyone:  # they run too; vLLM would sleep after a step without work
            output.total_num_scheduled_tokens += len(self.running) - len(scheduled)
        return output

    @contextmanager
    def _only_those_in_need(self) -> Iterator[None]:
        """Inside, the requests that go on by themselves are not in `running`."""
        every = self.running
        needing = [request for request in every if request.request_id in self._needing]
        # Prompts take what the others leave: a generating request runs, scheduled or not.
        needing.sort(key=lambda r: r.num_tokens - r.num_computed_tokens > 1)
        self._others = others = len(every) - len(needing)
        limits = {name: getattr(self, name) for name in _LIMITS if hasattr(self, name)}
        self.running = list(needing)
        for name, limit in limits.items():
            setattr(self, name, max(limit - others, 0))
        try:
            yield
        finally:
            self._others = 0
            for name, limit in limits.items():
                setattr(self, name, limit)
            there = {id(request) for request in self.running}
            preempted = {id(request) for request in needing} - there
            before = {id(request) for request in needing}
            admitted = [request for request in self.running if id(request) not in before]
            self.running = [r for r in every if id(r) not in preempted] + admitted

    def get_request_counts(self) -> tuple[int, int]:
        """As in vLLM, which shares a step's rows among them: with the hidden ones."""
        running, waiting = super().get_request_counts()
        return running + self._others, waiting

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
        emitting = self._take_in(scheduler_output.num_scheduled_tokens, progress)
        self._stats.add(progress.stats)
        self._progress = progress
        visible = copy(scheduler_output)
        visible.num_scheduled_tokens = emitting
        outputs = super().update_from_output(visible, model_runner_output)
        if not self.log_stats:  # statistics are not logged
            self._stats = LoopStats()
        self._clock.end(progress, idle=not self.has_unfinished_requests())
        for of_client in outputs.values():
            for output in of_client.outputs:
                self._complete(output, progress)
        self._note_needs({*emitting, *scheduler_output.num_scheduled_tokens})
        if self._refused:
            running = self._refused.keys() & self.requests.keys()
            self._refused = {name: self._refused[name] for name in running}
        return outputs

    def _runs(self, request_id: str) -> bool:
        request = self.requests.get(request_id)
        return request is not None and request.status == RequestStatus.RUNNING

    def _take_in(self, scheduled: Mapping[str, int], progress: LoopProgress) -> dict[str, int]:
        """Books what a step did. Returns the requests that have a token, and for how many positions
        vLLM has to take them to be scheduled."""
        manager, requests = self.kv_cache_manager, self.requests
        manager.adapt_offer(progress.stalled)
        for name, taken in progress.taken.items():
            manager.book(name, taken, self._runs(name))
        for name, positions in progress.complete.items():
            if self._runs(name):
                manager.publish(requests[name], positions)
        manager.note(progress.wanted, progress.in_flight, {*scheduled, *progress.exit_depths})
        for name, reason in progress.failed.items():
            if self._runs(name):
                self._end_with_error(name, reason)
        emitting = {}
        for name in progress.exit_depths:
            if name in self._refused:
                continue
            emitting[name] = scheduled.get(name, 1)
            if self._runs(name):
                request = requests[name]
                if name not in scheduled:
                    request.num_computed_tokens = request.num_tokens
                # All tokens but the last have been computed.
                request.num_computed_tokens += len(progress.further.get(name, ()))
            if name not in scheduled and name in requests:
                requests[name].num_in_flight_tokens += 1  # as if it had been scheduled
        for name, count in scheduled.items():
            if name not in emitting and name in requests:
                requests[name].num_in_flight_tokens -= count
                if self._runs(name) and name in progress.in_flight:
                    # It needs one token of the next schedule's budget, though it begins nothing.
                    requests[name].num_computed_tokens = requests[name].num_tokens - 1
        for name, computed in progress.computed.items():
            if self._runs(name):
                requests[name].num_computed_tokens = computed
                self._needing.add(name)
        return emitting

    def _note_needs(self, names: Iterable[str]) -> None:
        """Which of the requests `names`, which were scheduled or got a token, the next schedule has
        to consider."""
        for name in names:
            if self._runs(name):
                request = self.requests[name]
                if request.use_structured_output or self.kv_cache_manager.needs_block(request):
                    self._needing.add(name)

    def _depths_of(self, name: str) -> list[int]:
        """The exit depths of the tokens that a request got in the step that is being booked."""
        progress = self._progress
        return [progress.exit_depths[name], *progress.further.get(name, ())]

    def _complete(self, output: Any, progress: LoopProgress) -> None:
        """Adds to an output of vLLM's the exit depths of its tokens, or why its request failed."""
        name = output.request_id
        if output.finish_reason == FinishReason.ERROR:
            output.stop_reason = progress.failed.get(name) or self._refused.get(name)
        if output.new_token_ids:
            # Its answer may have ended before the last of them.
            exit_depths.send(output, self._depths_of(name)[: len(output.new_token_ids)])

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, with what the loop did since they were made last."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._stats.blocks = self.blocks_by_depth()
            self._stats.sequences = self.sequences_that_fit()
            self._stats.send_with(stats)
            self._stats = LoopStats()
        return stats

    def _update_request_with_output(
        self, request: "Request", *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """As in vLLM; notes the exit depths. If the answer ends before the last token of a step,
        only positions before its own last token count: a session goes on from there."""
        tokens, stopped = super()._update_request_with_output(request, *args, **kwargs)
        self._stats.exit_depths += self._depths_of(request.request_id)[: len(tokens)]
        if stopped:
            computed = min(request.num_computed_tokens, request.num_tokens - 1)
            request.num_computed_tokens = computed
        return tokens, stopped

    def _handle_stopped_request(self, request: "Request") -> bool:
        """As in vLLM. A session that waits for input holds no blocks: requests that run, whose
        deep planes grow, could not take them from it."""
        finished = super()._handle_stopped_request(request)
        if request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            self.kv_cache_manager.free(request)
            self._dropped.append(request.request_id)
        return finished

    def _update_request_as_session(self, session: "Request", update: Any) -> None:
        """Continues a streaming-input session from the positions that are complete at every depth
        in the prefix cache, because the planes of its answers may have gaps."""
        super()._update_request_as_session(session, update)
        self.kv_cache_manager.free(session)
        session.num_computed_tokens = 0
        self._admit(session)
