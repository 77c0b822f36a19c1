"""What ``/metrics`` shows: Prometheus names as other servers have them, behind ``medusa_``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..request import Stats

if TYPE_CHECKING:
    from ..async_session import Health

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server. ``health``: its session's state, or None before it is loaded."""

    def __init__(self, health: Callable[[], Health | None]) -> None:
        self.registry = CollectorRegistry()

        def of(field: str) -> Callable[[], float]:
            return lambda: float(getattr(health(), field, 0))

        running = self._new(Gauge, "num_requests_running", "Requests that hold a slot.")
        running.set_function(of("running"))
        self._new(Gauge, "num_requests_waiting", "Requests that wait for a slot.").set_function(of("waiting"))
        self._prompt = self._new(Counter, "prompt_tokens", "Tokens of prompts.")
        self._queried = self._new(Counter, "prefix_cache_queries", "Prompt tokens that were looked up in the cache.")
        self._hits = self._new(Counter, "prefix_cache_hits", "Prompt tokens that were found there.")
        self._generated = self._new(Counter, "generation_tokens", "Tokens that were emitted.")
        self._success = self._new(Counter, "request_success", "Requests that ended.", ("finished_reason",))
        self._refused = self._new(Counter, "request_refused", "Requests that were refused.", ("status",))
        self._drafts = self._new(Counter, "spec_decode_num_drafts", "Steps that verified drafted tokens.")
        self._drafted = self._new(Counter, "spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = self._new(Counter, "spec_decode_num_accepted_tokens", "Accepted drafted tokens.")
        places = "Accepted drafted tokens by their place in the draft."
        self._places = self._new(Counter, "spec_decode_num_accepted_tokens_per_pos", places, ("position",))
        self._first = self._new(Histogram, "time_to_first_token_seconds", "From arrival to the first token.", (), _SECONDS)
        self._gaps = self._new(Histogram, "inter_token_latency_seconds", "A step's seconds by its tokens.", (), _SECONDS)
        self._queued = self._new(Histogram, "request_queue_time_seconds", "From arrival to a slot.", (), _SECONDS)
        self._whole = self._new(Histogram, "e2e_request_latency_seconds", "From arrival to the end.", (), _SECONDS)

    def _new(self, kind: Any, name: str, text: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = ()) -> Any:
        options = {"buckets": buckets} if buckets else {}
        return kind(f"medusa_{name}", text, labels, registry=self.registry, **options)

    def refused(self, status: int) -> None:
        """Count a refusal."""
        self._refused.labels(status).inc()

    def tokens(self, count: int, arrived: float, before: float | None) -> float:
        """Count the tokens of a chunk. ``before``: when the previous one came. Returns the time now."""
        now = time.monotonic()
        self._generated.inc(count)
        if before is None:
            self._first.observe(now - arrived)
        elif count:
            for _ in range(count):
                self._gaps.observe((now - before) / count)
        return now

    def ended(self, reason: str, arrived: float, prompt_tokens: int, stats: Stats | None) -> None:
        """Count a generation that ended. ``stats``: None where its client left before."""
        self._success.labels(reason).inc()
        self._prompt.inc(prompt_tokens)
        self._whole.observe(time.monotonic() - arrived)
        if stats is not None:
            self._queued.observe(stats.queue_seconds)
            self._queried.inc(prompt_tokens)
            self._hits.inc(stats.cached_tokens)
            acceptance = acceptance_of(stats)
            self._drafts.inc(acceptance["num_spec_steps"])
            self._drafted.inc(acceptance["num_draft_tokens"])
            self._accepted.inc(acceptance["num_accepted_draft_tokens"])
            histogram = acceptance["acceptance_histogram"]
            for place in range(1, len(histogram)):
                self._places.labels(place - 1).inc(sum(histogram[place:]))

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


def acceptance_of(*all_stats: Stats) -> dict[str, Any]:
    """Sum up the speculation of generations. Only steps that verified drafted tokens count, as in vLLM.

    ``acceptance_histogram[a]``: steps that accepted ``a`` drafted tokens.
    """
    histogram = [0] * (1 + max((max(stats.accepted, default=0) for stats in all_stats), default=0))
    drafted = 0
    for stats in all_stats:
        for accepted, steps in stats.accepted.items():
            histogram[accepted] += steps
        histogram[0] -= stats.rows_histogram.get(1, 0)  # a step of one row drafts nothing and accepts nothing
        drafted += stats.rows - stats.steps
    steps = sum(histogram)
    accepted = sum(count * many for count, many in enumerate(histogram))
    return {
        "mean_acceptance_length": 1 + accepted / steps if steps else 1.0,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": histogram,
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
    }
