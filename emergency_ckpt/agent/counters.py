"""What an agent counts, for `GET /metrics`: declared once, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PREFIX = "emergency_ckpt_agent"


class Counters:
    """The metrics of one agent."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            f"{_PREFIX}_requests", "requests by page and status", ["page", "status"], registry=self._registry
        )
        self.answers = Counter(
            f"{_PREFIX}_shard_answers",
            "answers with shards by how they ended: sent, slot_gone, client_gone, client_slow",
            ["ending"],
            registry=self._registry,
        )
        self.bytes_served = Counter(
            f"{_PREFIX}_bytes_served",
            "bytes of shards in answers that were sent whole",
            registry=self._registry,
        )
        self.send_seconds = Histogram(
            f"{_PREFIX}_send_seconds",
            "duration of answers with shards that were sent whole",
            buckets=(0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120),
            registry=self._registry,
        )
        self.bytes_served_total = 0

    def watch(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(f"{_PREFIX}_{name}", help_text, registry=self._registry).set_function(read)

    def count_answer(self, ending: str, nbytes: int, seconds: float) -> None:
        """One answer with shards."""
        self.answers.labels(ending).inc()
        if ending == "sent":
            self.bytes_served.inc(nbytes)
            self.bytes_served_total += nbytes
            self.send_seconds.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
