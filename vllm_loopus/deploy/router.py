"""A Ray Serve router by loop budget, which uses Ray's public interface for custom routers.

Ray's routers count requests, so that eight loops and a thousand tokens have the same weight as one
loop and ten tokens. This router sums, for each replica, the loop budgets of its outstanding
requests, and sends a request to the replica with the least sum. Requests whose body it cannot read
count with the defaults.

Each ingress process of Serve has a router, which only knows the requests that it has sent. Replicas
with equal sums are ordered by the length of their queues, which all routers can see.
"""

import random
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from vllm_loopus.deploy.budgets import loop_budget

MOST_ENDED = 4096  # maximum number of stored ends of requests that are not (yet) routed


class LoopBudgetRouter(RequestRouter):
    """Sends requests to the replica with the least outstanding loop budget."""

    def initialize_state(
        self,
        max_loops: int = 8,
        default_tokens: int = 256,
        efforts: Mapping[str, int] | None = None,
    ) -> None:
        """Called by Serve with `request_router_kwargs`; see `loop_budget`."""
        self._max_loops, self._default_tokens, self._efforts = max_loops, default_tokens, efforts
        self._outstanding: defaultdict[ReplicaID, int] = defaultdict(int)
        self._sent: dict[tuple[ReplicaID, str], int] = {}
        self._ended: dict[tuple[ReplicaID, str], None] = {}  # in order of their end

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas in order of preference; the first with free capacity gets the request."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        ranked = random.sample(candidate_replicas, len(candidate_replicas))
        ranked.sort(key=lambda replica: self._load(replica.replica_id))
        return [[replica] for replica in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Called by Serve after a replica has accepted a request, which may have ended already."""
        key = replica_id, pending_request.metadata.internal_request_id
        if key in self._ended:
            del self._ended[key]
            return
        body = pending_request.args[0] if pending_request.args else None
        budget = loop_budget(body, self._max_loops, self._default_tokens, self._efforts)
        self._sent[key] = budget
        self._outstanding[replica_id] += budget

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve once for each attempt, including those that failed or were refused.

        An attempt that was never routed cannot be distinguished from one whose end is reported
        before its routing. So if a replica refuses a request and accepts it later, it may not be
        counted; otherwise it could be counted forever.
        """
        key = replica_id, internal_request_id
        budget = self._sent.pop(key, None)
        if budget is None:
            self._ended[key] = None
            if len(self._ended) > MOST_ENDED:
                del self._ended[next(iter(self._ended))]
            return
        self._outstanding[replica_id] -= budget
        if not self._outstanding[replica_id]:
            del self._outstanding[replica_id]

    def _load(self, replica_id: ReplicaID) -> tuple[int, int]:
        return self._outstanding.get(replica_id, 0), self.replica_queue_len_cache.get(
            replica_id
        ) or 0
