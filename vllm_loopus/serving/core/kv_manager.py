"""vLLM's KV cache manager for planes that get their blocks as depth requires.

Depth 1 is allocated as in vLLM. Blocks of deeper planes are offered to the worker, booked when it
has taken them, and published to the prefix cache when they are complete at their depth.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from math import ceil
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request, RequestStatus

from vllm_loopus.serving.core.demand import Demand
from vllm_loopus.serving.core.plane_managers import NO_REPLAY, adopt_coordinator
from vllm_loopus.serving.messages.blocks import BlockOffer, TakenBlock

# Requests that end with one of these do not show what a request needs.
CUT_SHORT = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)


@dataclass
class _Holder:
    """A request that holds blocks."""

    request: Request
    budget: int  # planes that its positions may need
    held: int  # blocks, shared ones included
    wanted: int = 0  # blocks without which it cannot continue
    in_flight: bool = False
    at_first: int = 0  # blocks of depth 1


class DepthKVCacheManager(KVCacheManager):
    """vLLM's manager with planes by depth; `adopt` makes one of it."""

    _budget: Callable[[Request], int]
    _planes: tuple[Any, ...]  # PlaneManager, by depth
    _block_size: int
    _lookahead: int  # positions of depth 1 that the worker may begin before a token is certain
    _blocks_a_pass: int  # that the row budget of a pass can fill at one depth
    _holders: dict[str, _Holder]
    _promised: dict[str, int]  # blocks, in this step
    _promised_in_all: int
    _needed: dict[str, float]  # planes that preempted requests had for each block of depth 1
    demand: Demand
    _lacking: set[str]  # requests that want blocks
    _missing: int  # blocks that all holders may still take, at most
    _extra: int  # blocks to offer beyond the usual, after steps that lacked some
    _recent: float  # depths times blocks of depth 1 that were given lately
    short_of_planes: int  # how often a sequence could not continue for lack of deeper blocks
    hits_by_depth: list[int]  # positions found in the prefix cache so far

    @classmethod
    def adopt(
        cls,
        manager: KVCacheManager,
        budget: Callable[[Request], int],
        row_budget: int,
        lookahead: int = 0,
    ) -> None:
        """`budget`: how many planes the positions of a request may need. `row_budget`: the most
        rows of a pass. `lookahead`: how many positions may be guessed at once."""
        adopt_coordinator(manager.coordinator)
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager._budget = budget
        manager._lookahead = lookahead
        manager._planes = manager.coordinator.single_type_managers
        manager._block_size = manager._planes[0].block_size
        manager._blocks_a_pass = cdiv(row_budget, manager._block_size)
        manager._holders, manager._needed = {}, {}
        manager._promised, manager._promised_in_all = {}, 0
        manager._lacking, manager._missing = set(), 0
        manager._extra, manager._recent = 0, 0.0
        manager.demand = Demand()
        manager.short_of_planes = 0
        manager.hits_by_depth = [0] * len(manager._planes)

    def blocks_by_depth(self) -> list[int]:
        """Blocks that sequences hold at each depth, shared ones counted once."""
        return [plane.in_use for plane in self._planes]

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """As in vLLM, for the depths that the request may need."""
        found, length, boundary = super().get_computed_blocks(request)
        budget = self._budget(request)
        blocks = tuple(b if depth < budget else [] for depth, b in enumerate(found.blocks))
        return self.create_kv_cache_blocks(blocks), length, boundary

    def new_step_starts(self) -> None:
        self._promised, self._promised_in_all = {}, 0
        super().new_step_starts()

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """As in vLLM at depth 1, with room for one more position, so that the worker can begin it
        by itself. Also None if the request lacks blocks of deeper planes to continue, or, for a
        request to be admitted, if what it is expected to need is not free."""
        name = request.request_id
        holder = self._holders.get(name)
        hits: Sequence[Sequence[KVCacheBlock]] = ()
        wanted = 0
        if holder is None:
            computed = kwargs.get("new_computed_blocks")
            hits = computed.blocks if computed is not None else ()
            # If no request runs, it is admitted in any case: one sequence always fits.
            crowded = kwargs.get("full_sequence_must_fit") and self._holders
            if crowded and not self._fits(request, hits):
                return None
            holder = _Holder(request, self._budget(request), sum(map(len, hits)))
        elif holder.in_flight and not self._lacks_the_next(request, holder):
            return self._continue(name, holder, kwargs.get("reserved_blocks", 0))
        else:
            wanted = holder.wanted
        after = request.num_computed_tokens + num_new_tokens
        left = self._last_position(request) + 1 - after
        if after >= request.num_tokens and left > 0:
            kwargs["num_lookahead_tokens"] = min(1 + self._may_guess, left)
        kwargs["delay_cache_blocks"] = True
        if "has_scheduled_reqs" in kwargs:  # some run without being scheduled
            kwargs["has_scheduled_reqs"] = bool(self._holders)
        kwargs["reserved_blocks"] = (
            kwargs.get("reserved_blocks", 0) + self._promised_in_all + wanted
        )
        blocks = super().allocate_slots(request, num_new_tokens, *args, **kwargs)
        if blocks is None:
            self.short_of_planes += wanted > 0
        else:
            at_first = len(blocks.blocks[0]) + (len(hits[0]) if hits else 0)
            holder.held += len(blocks.blocks[0])
            holder.at_first += at_first
            self._recent += len(blocks.blocks[0]) * len(self._planes)
            self._missing += at_first * holder.budget - len(blocks.blocks[0])
            self._missing -= sum(map(len, hits))
            self._holders[name] = holder
            self._promise(name, wanted)
            for depth, found in enumerate(hits):
                self.hits_by_depth[depth] += len(found) * self._block_size
        return blocks

    def _continue(self, name: str, holder: _Holder, reserved: int) -> KVCacheBlocks | None:
        """For a sequence in flight, which has its blocks of depth 1; None if it lacks blocks of
        deeper planes to continue."""
        most = len(self._planes) * self._blocks_a_pass - self._promised_in_all
        wanted = min(holder.wanted, max(0, most))
        free = self.block_pool.get_num_free_blocks() - self._promised_in_all - reserved
        if wanted > free:
            self.short_of_planes += 1
            return None
        self._promise(name, wanted)
        return self.empty_kv_cache_blocks

    def _promise(self, name: str, count: int) -> None:
        self._promised[name] = count
        self._promised_in_all += count

    def _fits(self, request: Request, hits: Sequence[Sequence[KVCacheBlock]]) -> bool:
        """Whether what the request is expected to need is free, besides what the running requests
        are still expected to take."""
        in_use = sum(block.ref_cnt > 0 for blocks in hits for block in blocks)
        needed = max(0, self._expected(request, self._budget(request)) - in_use)
        others = sum(
            max(0, self._expected(other.request, other.budget) - other.held)
            for other in self._holders.values()
            if other.request.status == RequestStatus.RUNNING
        )
        return needed + others <= self.block_pool.get_num_free_blocks()

    def _expected(self, request: Request, budget: int) -> int:
        """How many blocks a request is expected to hold in the end."""
        new_tokens = min(int(self.demand.new_tokens), request.max_tokens)
        tokens = max(request.num_tokens, request.num_prompt_tokens + new_tokens)
        planes = max(self.demand.planes(budget), self._needed.get(request.request_id, 0))
        return ceil(cdiv(min(tokens, self.max_model_len), self._block_size) * planes)

    @property
    def _may_guess(self) -> int:
        """How many positions may be guessed at once: none where certain ones may lack blocks."""
        return 0 if not self._lookahead or self.scarce else self._lookahead

    def needs_block(self, request: Request) -> bool:
        """Whether a running request has no block of depth 1 for the position after its newest."""
        holder = self._holders[request.request_id]
        position = min(request.num_tokens + self._may_guess, self._last_position(request))
        return position >= holder.at_first * self._block_size

    def _lacks_the_next(self, request: Request, holder: _Holder) -> bool:
        """Whether a request in flight has blocks for its tokens, but none for the next one. A
        prompt in chunks gets its blocks chunk by chunk."""
        whole = holder.at_first * self._block_size >= request.num_tokens
        return whole and self.needs_block(request)

    def _last_position(self, request: Request) -> int:
        """The last position that is computed if the request generates all that it may: that of the
        token before the last one."""
        return min(self.max_model_len, request.num_prompt_tokens + request.max_tokens) - 2

    @property
    def scarce(self) -> bool:
        """Whether blocks have to be shared out: not everything is free that a step might take."""
        needed = 2 * self._wanted_by_a_step() + len(self._holders)  # and a block of depth 1 each
        return self.block_pool.get_num_free_blocks() < needed

    def _wanted_by_a_step(self) -> int:
        """Blocks of deeper planes for a step: those that are wanted, and about as many as sequences
        may come to need, which is most right after they got blocks of depth 1."""
        wanted = sum(self._holders[name].wanted for name in self._lacking)
        likely = 2 * len(self._holders) + 2 * int(self._recent) + self._extra
        return min(self._missing, wanted + likely)

    def adapt_offer(self, stalled: int) -> None:
        """Offers more after a step in which sequences lacked blocks, and slowly less again."""
        if stalled:
            most = len(self._planes) * (self._blocks_a_pass + 3 * len(self._holders))
            self._extra = min(2 * self._extra + len(self._planes) * stalled, most)
        else:
            self._extra -= cdiv(self._extra, 32)
        self._recent *= 0.75

    def offer(self) -> BlockOffer:
        """The free blocks that a step may take, with at least those that are promised."""
        promised = {name: count for name, count in self._promised.items() if count}
        most = max(self._wanted_by_a_step(), self._promised_in_all)
        free: list[int] = []
        queue = self.block_pool.free_block_queue
        block = queue.fake_free_list_head.next_free_block
        for _ in range(min(most, queue.num_free_blocks)):
            assert block is not None
            free.append(block.block_id)
            block = block.next_free_block
        return BlockOffer(free, promised)

    def book(self, name: str, taken: Sequence[TakenBlock], runs: bool) -> None:
        """The worker has filled these free blocks for a sequence. `runs`: whether it still does;
        blocks of one that does not stay free."""
        self.block_pool.evict_blocks({block.block_id for block in taken})
        if runs:
            self._holders[name].held += len(taken)
            self._missing -= len(taken)
            for depth, column, block_id in taken:
                block = self.block_pool.blocks[block_id]
                self._planes[depth - 1].place(name, column, block)

    def note(self, wanted: Mapping[str, int], in_flight: Set[str], names: Iterable[str]) -> None:
        """After a step with the requests `names`: which of them cannot continue without how many
        blocks, and which have positions that have started and not finished."""
        for name in {*names, *self._lacking, *wanted}:
            if (holder := self._holders.get(name)) is not None:
                holder.in_flight = name in in_flight
                holder.wanted = wanted.get(name, 0)
        self._lacking = wanted.keys() & self._holders.keys()

    def publish(self, request: Request, complete: Sequence[int]) -> None:
        """The first `complete[r - 1]` positions are complete at depth r: their full blocks go to
        the prefix cache."""
        if self.enable_caching:
            for plane, positions in zip(self._planes, complete, strict=False):
                plane.cache_blocks(request, positions, **NO_REPLAY)

    def take_events(self) -> list[Any]:
        """As in vLLM, of depth 1 alone: the hash of a block is the same at every depth, so whoever
        follows the events would count a block once a depth, and lose it with its deepest plane."""
        return [event for event in super().take_events() if not getattr(event, "group_idx", 0)]

    def free(self, request: Request) -> None:
        """As in vLLM. Deep planes are evicted first, since they are useless without the shallower
        ones."""
        name = request.request_id
        holder = self._holders.pop(name, None)
        self._lacking.discard(name)
        if holder is not None:
            self._missing -= holder.budget * holder.at_first - holder.held
        self._promised_in_all -= self._promised.pop(name, 0)
        at_first = len(self._planes[0].req_to_blocks.get(name, ()))
        if request.is_finished():
            self._needed.pop(name, None)
        if holder is not None and at_first:
            if not request.is_finished():  # it resumes when there is room for what it had
                self._needed[name] = holder.held / at_first
            elif request.status not in CUT_SHORT:
                new_tokens = request.num_tokens - request.num_prompt_tokens
                self.demand.observe(holder.budget, holder.held / at_first, new_tokens)
        for plane in reversed(self._planes):
            plane.free(name)

    def estimate_cached_tokens(self, request: Request) -> int:
        """At depth 1: what vLLM's statistics count as created in the cache."""
        blocks = self._planes[0].req_to_blocks.get(request.request_id, ())
        return max((block.block_hash_num_tokens or 0 for block in blocks), default=0)
