"""Which replica on Ray Serve takes a request. Ray imports this module in its proxies."""

from __future__ import annotations

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica


class SessionRouter(ConsistentHashRouter):
    """Sends requests with the header ``x-session-id`` to their session's replica, and others to the one with the fewest requests.

    Ray's own router spreads those others by chance: some would wait for a slot while another replica has free ones.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas by rank; of one rank, Ray takes the one with the fewest requests."""
        if pending_request is None or pending_request.metadata.session_id:
            return await super().choose_replicas(candidate_replicas, pending_request)  # type: ignore[no-any-return]
        pending_request.routing_context.should_backoff = True
        return [candidate_replicas]
