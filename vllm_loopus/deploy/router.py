"""A router of Ray Serve that knows loop budgets, by Ray's public interface for routers.

Ray's own routers count requests: one with eight loops and a thousand tokens weighs as much as one
with a single loop and ten. This one keeps, for each replica, the passes that its outstanding
requests may still take at most, and sends a request where they are fewest. Requests whose body it
cannot read count with the served budget.

A router lives in each process that sends requests (Serve's ingress replicas) and knows what it sent
itself; among equals the replica with the shorter queue, which all see, is taken.
"""

import random
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from vllm_loopus.deploy.budgets import loop_budget

MOST_ENDED = 4096  # ends remembered of requests that were not routed, or not yet


class LoopBudgetRouter(RequestRouter):
    """Least outstanding loop budget first."""

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
        self._ended: dict[tuple[ReplicaID, str], None] = {}  # in the order in which they ended

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """A rank for each replica: the first with room gets the request."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        ranked = random.sample(candidate_replicas, len(candidate_replicas))
        ranked.sort(key=lambda replica: self._load(replica.replica_id))
        return [[replica] for replica in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Serve calls this once the replica has taken the request, which may have ended by then."""
        key = replica_id, pending_request.metadata.internal_request_id
        if key in self._ended:
            del self._ended[key]
            return
        body = pending_request.args[0] if pending_request.args else None
        budget = loop_budget(body, self._max_loops, self._default_tokens, self._efforts)
        self._sent[key] = budget
        self._outstanding[replica_id] += budget

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve calls this once for each attempt, also for one that failed or that the replica
        refused, and then perhaps while another replica has the request.

        An attempt that was not routed looks like one that ends before Serve says that it was. A
        replica that refuses a request and takes it later may thus have it uncounted: better than
        counted for ever.
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
