"""Counters of this process: what a dashboard plots, kept in memory and read as one consistent snapshot.

Every metric is declared here with its kind and its help text, so that an exporter needs no second list.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import threading
from typing import Literal

from emergency_ckpt.telemetry.events import (
    DeviceDivergenceEvent,
    DrainEvent,
    Event,
    RejectedStepEvent,
    ReplicaDivergenceEvent,
    RestoreEvent,
    SaveEvent,
    SkippedSaveEvent,
)
from emergency_ckpt.telemetry.leaving_events import DecisionEvent, NoticeEvent

_RECENT = 3


@dataclasses.dataclass(frozen=True)
class MetricSpec:
    """A counter only grows; a gauge holds the last value that was set."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str


class Metric(enum.Enum):
    """Every metric of this package."""

    SAVES_STARTED = MetricSpec("saves_started", "counter", "saves for which a slot was taken")
    SAVES_SEALED = MetricSpec("saves_sealed", "counter", "saves that this process sealed")
    SAVES_COMPLETE = MetricSpec("saves_complete", "counter", "saves with the outcome complete")
    SAVES_ABANDONED = MetricSpec(
        "saves_abandoned", "counter", "saves with the outcome abandoned, skipped ones excluded"
    )
    SAVES_SKIPPED = MetricSpec("saves_skipped", "counter", "saves that were due and not made")
    SAVED_BYTES = MetricSpec("saved_bytes", "counter", "bytes sealed in slots of this process")
    BLOCKED_SECONDS = MetricSpec("blocked_seconds", "counter", "time that the train loop waited for saves")
    LAST_SAVE_BLOCKED_SECONDS = MetricSpec("last_save_blocked_seconds", "gauge", "wait for the last save")
    RECENT_SAVE_SECONDS = MetricSpec(
        "recent_save_seconds", "gauge", "longest of the last three saves, from the call until it was complete"
    )
    LAST_COMPLETE_STEP = MetricSpec("last_complete_step", "gauge", "newest step with the outcome complete")
    DRAINS_COMMITTED = MetricSpec("drains_committed", "counter", "drains whose step was committed")
    DRAINS_SUPERSEDED = MetricSpec(
        "drains_superseded", "counter", "drains given up for a newer step or generation"
    )
    DRAINS_FAILED = MetricSpec("drains_failed", "counter", "drains that failed")
    DRAINED_BYTES = MetricSpec("drained_bytes", "counter", "bytes written to the persistent tier")
    RECENT_DRAIN_SECONDS = MetricSpec(
        "recent_drain_seconds", "gauge", "longest of the last three drains that were committed"
    )
    LAST_COMMITTED_STEP = MetricSpec("last_committed_step", "gauge", "newest step drained and committed")
    NOTICES = MetricSpec("notices", "counter", "notices of preemptions, and wishes for a save, that were heard")
    PREEMPTIONS = MetricSpec("preemptions", "counter", "steps at which all processes reacted to notices")
    RESTORES = MetricSpec("restores", "counter", "restores that put a state on the devices")
    RESTORED_BYTES = MetricSpec("restored_bytes", "counter", "bytes restored by this process")
    COPIED_BYTES = MetricSpec(
        "copied_bytes", "counter", "bytes of copies fetched from other processes at saves"
    )
    SURVIVES_HOST_LOSSES = MetricSpec(
        "survives_host_losses", "gauge", "hosts of which any may be lost without losing a complete ramdisk step"
    )
    SURVIVES_SLICE_LOSSES = MetricSpec(
        "survives_slice_losses",
        "gauge",
        "slices of which any may be lost without losing a complete ramdisk step",
    )
    FETCHED_BYTES = MetricSpec("fetched_bytes", "counter", "bytes fetched from the slots of other processes")
    EARLY_BYTES = MetricSpec(
        "early_bytes", "counter", "bytes that had been fetched for a restore before it was called"
    )
    RESTORE_WINDOW_BYTES = MetricSpec(
        "restore_window_bytes", "gauge", "most host memory that a restore without a slot used on its way"
    )
    LAST_RESTORE_SECONDS = MetricSpec("last_restore_seconds", "gauge", "duration of the last restore")
    LAST_RESTORED_STEP = MetricSpec("last_restored_step", "gauge", "step of the last restore")
    STEPS_REJECTED = MetricSpec("steps_rejected", "counter", "steps that could not be restored although listed")
    REPLICA_DIVERGENCES = MetricSpec(
        "replica_divergences",
        "counter",
        "leaves of saved steps, and restored steps, whose copies were not equal",
    )
    LAST_DIVERGENT_STEP = MetricSpec(
        "last_divergent_step", "gauge", "newest step in which copies were not equal"
    )


class Metrics:
    """The metrics of one manager. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[Metric, float] = {m: 0 for m in Metric if m.value.kind == "counter"}
        self._recent: dict[Metric, collections.deque[float]] = {
            metric: collections.deque(maxlen=_RECENT)
            for metric in (Metric.RECENT_SAVE_SECONDS, Metric.RECENT_DRAIN_SECONDS)
        }

    def add(self, metric: Metric, amount: float = 1) -> None:
        """Adds to a counter. Raises ValueError for a gauge or a negative amount."""
        if metric.value.kind != "counter" or amount < 0:
            raise ValueError(f"{metric.value.name} is a {metric.value.kind}; {amount} cannot be added to it")
        with self._lock:
            self._values[metric] += amount

    def set(self, metric: Metric, value: float) -> None:
        """Sets a gauge. Raises ValueError for a counter."""
        if metric.value.kind != "gauge":
            raise ValueError(f"{metric.value.name} is a {metric.value.kind} and cannot be set")
        with self._lock:
            self._values[metric] = value

    def snapshot(self) -> dict[str, float]:
        """All values by name, of one moment; a gauge that was never set is absent."""
        with self._lock:
            return {metric.value.name: value for metric, value in self._values.items()}

    def observe(self, event: Event) -> None:
        """Counts what an event says. Saves started and sealed have no event and are added by who makes them."""
        with self._lock:
            self._observe(event)

    def _observe(self, event: Event) -> None:
        values = self._values
        match event:
            case SaveEvent():
                values[Metric.BLOCKED_SECONDS] += event.blocked_seconds
                values[Metric.LAST_SAVE_BLOCKED_SECONDS] = event.blocked_seconds
                if event.sealed_seconds is not None:
                    values[Metric.SAVED_BYTES] += event.bytes
                if event.outcome == "complete":
                    values[Metric.SAVES_COMPLETE] += 1
                    self._note(Metric.RECENT_SAVE_SECONDS, event.outcome_seconds)
                    self._raise_to(Metric.LAST_COMPLETE_STEP, event.step)
                else:
                    values[Metric.SAVES_ABANDONED] += 1
            case SkippedSaveEvent():
                values[Metric.SAVES_SKIPPED] += 1
                values[Metric.BLOCKED_SECONDS] += event.blocked_seconds
            case DrainEvent():
                values[Metric.DRAINED_BYTES] += event.bytes
                match event.result:
                    case "committed":
                        values[Metric.DRAINS_COMMITTED] += 1
                        self._note(Metric.RECENT_DRAIN_SECONDS, event.seconds)
                        self._raise_to(Metric.LAST_COMMITTED_STEP, event.step)
                    case "superseded":
                        values[Metric.DRAINS_SUPERSEDED] += 1
                    case "failed":
                        values[Metric.DRAINS_FAILED] += 1
            case NoticeEvent():
                values[Metric.NOTICES] += 1
            case DecisionEvent():
                values[Metric.PREEMPTIONS] += 1
            case RestoreEvent():
                values[Metric.RESTORES] += 1
                values[Metric.RESTORED_BYTES] += event.bytes
                values[Metric.LAST_RESTORE_SECONDS] = event.seconds
                values[Metric.LAST_RESTORED_STEP] = event.step
                # Steps after the restored one are void, so "newest" begins again here.
                values.pop(Metric.LAST_COMPLETE_STEP, None)
                values.pop(Metric.LAST_COMMITTED_STEP, None)
            case RejectedStepEvent():
                values[Metric.STEPS_REJECTED] += 1
            case ReplicaDivergenceEvent() | DeviceDivergenceEvent():
                values[Metric.REPLICA_DIVERGENCES] += 1
                values[Metric.LAST_DIVERGENT_STEP] = event.step

    def _note(self, metric: Metric, seconds: float) -> None:
        recent = self._recent[metric]
        recent.append(seconds)
        self._values[metric] = max(recent)

    def _raise_to(self, metric: Metric, value: float) -> None:
        """Outcomes and commits may be reported out of order; the newest step must not go back."""
        self._values[metric] = max(value, self._values.get(metric, value))
