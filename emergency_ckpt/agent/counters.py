"""What an agent counts, for `GET /metrics`: declared once, in a registry of its own.

The table in docs/agent-metrics.md has all of them; a test holds it. No label has a value that a request chose.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from emergency_ckpt.core.retrying import StoreReason

_PREFIX = "emergency_ckpt_agent"
_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120)
_LONG_SECONDS = (0.1, 0.5, 1, 5, 30, 120, 600, 1800)

CountedEnding = Literal[
    "committed", "part_written", "superseded", "abandoned", "corrupt", "store_failed", "failed"
]
CountedFlush = Literal["committed", "nothing_left", "stood_down", "failed"]
CountedLastCall = CountedFlush
# The speed of a store changes: only drains of late say how long the next one takes.
_MOST_RECENT = 5


class Counters:
    """The metrics of one agent. Safe to use from any thread."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "requests by page and status", "page", "status")
        self.refusals = self._counter("refusals", "requests that were refused, by reason", "reason")
        self.refused_connections = self._counter(
            "refused_connections", "connections beyond those that are allowed"
        )
        self.answers = self._counter(
            "shard_answers",
            "answers with shards by how they ended: sent, slot_gone, client_gone, client_slow",
            "ending",
        )
        self.bytes_served = self._counter("served_bytes", "bytes of shards in answers that were sent whole")
        self.shards_served = self._counter("served_shards", "ranges of shards in answers that were sent whole")
        self.send_seconds = self._histogram(
            "send_seconds", "duration of answers with shards that were sent whole", _SECONDS
        )
        self._drains = self._counter(
            "drains",
            "drains by how they ended: committed, part_written (another commits), superseded (by a later life "
            "of the run), abandoned (others did not do their part, or the agent left), corrupt, store_failed, "
            "failed",
            "ending",
        )
        self._store_failures = self._counter(
            "store_failures",
            "drains with the ending store_failed by what the store did: throttled, unreachable, permission, "
            "credentials, missing (the bucket), full, occupied (by another step), unsupported, other",
            "reason",
        )
        self._drained_bytes = self._counter("drained_bytes", "bytes of parts that were written")
        self._drain_seconds = self._histogram("drain_seconds", "duration of drains", _LONG_SECONDS)
        self.flushes_begun = self._counter("flushes_begun", "trainers that died, whose newest step is seen to")
        self._flushes = self._counter(
            "flushes",
            "such trainers by what came of it: committed (led by this agent), nothing_left, stood_down (for "
            "another agent, trainer or life of the run), failed",
            "ending",
        )
        self.last_calls_begun = self._counter(
            "last_calls_begun", "lives whose newest step is to be persistent before a host goes away"
        )
        self._last_calls = self._counter(
            "last_calls",
            "such lives by what came of it: committed (led by this agent), nothing_left, stood_down (for "
            "another agent, or the trainers said goodbye), failed",
            "ending",
        )
        self.stalls = self._counter("trainer_stalls", "steps that took far longer than those before them")
        self.ended_trainers = self._counter("ended_trainers", "trainers that were ended because of a stall")
        self._recent: collections.deque[float] = collections.deque(maxlen=_MOST_RECENT)
        for ending in get_args(CountedEnding):
            self._drains.labels(ending)
        for ending in get_args(CountedFlush):
            self._flushes.labels(ending)
        for reason in get_args(StoreReason):
            self._store_failures.labels(reason)
            self._last_calls.labels(ending)
        self.deleted_steps = self._counter("deleted_steps", "persistent steps that were deleted after a flush")
        self.bytes_served_total = 0

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", help_text, labels, registry=self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", help_text, buckets=buckets, registry=self._registry)

    def watch(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(f"{_PREFIX}_{name}", help_text, registry=self._registry).set_function(read)

    def count_answer(self, ending: str, shards: int, nbytes: int, seconds: float) -> None:
        """One answer with shards."""
        self.answers.labels(ending).inc()
        if ending == "sent":
            self.bytes_served.inc(nbytes)
            self.shards_served.inc(shards)
            self.bytes_served_total += nbytes
            self.send_seconds.observe(seconds)

    def count_drain(self, ending: CountedEnding, nbytes: int, seconds: float) -> None:
        """One drain that ended."""
        self._drains.labels(ending).inc()
        self._drained_bytes.inc(nbytes)
        self._drain_seconds.observe(seconds)
        if nbytes and ending in ("committed", "part_written"):
            self._recent.append(seconds)

    @property
    def recent_drain_seconds(self) -> tuple[float, ...]:
        """How long the newest drains took that wrote something and ended well."""
        return tuple(self._recent)

    def count_store_failure(self, reason: StoreReason) -> None:
        """Why a drain failed."""
        self._store_failures.labels(reason).inc()

    def count_flush(self, ending: CountedFlush) -> None:
        """One flush that ended."""
        self._flushes.labels(ending).inc()

    def count_last_call(self, ending: CountedLastCall) -> None:
        """One last call that ended."""
        self._last_calls.labels(ending).inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
