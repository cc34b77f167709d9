"""Counters count every event once, also from many threads, and gauges show the newest."""

from __future__ import annotations

import threading

import pytest

from emergency_ckpt.telemetry.events import (
    DrainEvent,
    RejectedStepEvent,
    ReplicaDivergenceEvent,
    RestoreEvent,
    SaveEvent,
    SkippedSaveEvent,
    SourceBytes,
)
from emergency_ckpt.telemetry.metrics import Metric, Metrics


def saved(step: int, complete: bool = True) -> SaveEvent:
    return SaveEvent(
        step=step,
        bytes=100,
        blocked_seconds=0.25,
        sealed_seconds=0.5 if complete else None,
        outcome="complete" if complete else "abandoned",
        outcome_seconds=1,
    )


def test_events_are_counted_by_what_became_of_them() -> None:
    metrics = Metrics()
    for event in (
        saved(10),
        saved(20, complete=False),
        SkippedSaveEvent(step=30, blocked_seconds=0.5, reason="no slot"),
        DrainEvent(step=10, bytes=60, seconds=1, result="committed"),
        DrainEvent(step=20, bytes=5, seconds=1, result="failed"),
        DrainEvent(step=20, bytes=0, seconds=1, result="superseded"),
        RejectedStepEvent(step=20, saved_generation=1, reason="damaged"),
        ReplicaDivergenceEvent(
            step=10, leaf="w", boxes=("[0:4]",), deviating=(), versions=((0,), (1,)), slices=((0,), (1,))
        ),
    ):
        metrics.observe(event)
    assert metrics.snapshot() == {
        "saves_started": 0,
        "saves_sealed": 0,
        "saves_complete": 1,
        "saves_abandoned": 1,
        "saves_skipped": 1,
        "saved_bytes": 100,
        "blocked_seconds": 1.0,
        "last_save_blocked_seconds": 0.25,
        "recent_save_seconds": saved(10).outcome_seconds,
        "last_complete_step": 10,
        "drains_committed": 1,
        "drains_superseded": 1,
        "drains_failed": 1,
        "drained_bytes": 65,
        "recent_drain_seconds": 1,
        "last_committed_step": 10,
        "notices": 0,
        "preemptions": 0,
        "restores": 0,
        "restored_bytes": 0,
        "copied_bytes": 0,
        "fetched_bytes": 0,
        "early_bytes": 0,
        "steps_rejected": 1,
        "replica_divergences": 1,
        "last_divergent_step": 10,
    }


def test_outcomes_that_arrive_out_of_order_do_not_take_the_newest_step_back() -> None:
    metrics = Metrics()
    metrics.observe(saved(20))
    metrics.observe(saved(10))
    assert metrics.snapshot()["last_complete_step"] == 20


def test_after_a_restore_the_newest_step_is_counted_from_the_restored_one() -> None:
    metrics = Metrics()
    metrics.observe(saved(50))
    metrics.observe(
        RestoreEvent(
            step=40,
            saved_generation=1,
            plan="all local",
            reason="step 50 is damaged",
            sources=(SourceBytes("own slot", 1, 100),),
            seconds=2,
        )
    )
    restored = metrics.snapshot()
    assert (restored["restores"], restored["restored_bytes"], restored["last_restored_step"]) == (1, 100, 40)
    assert "last_complete_step" not in restored
    metrics.observe(saved(45))
    assert metrics.snapshot()["last_complete_step"] == 45


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.add(Metric.SAVES_STARTED)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.snapshot()["saves_started"] == 8000


def test_a_counter_only_grows_and_a_gauge_is_only_set() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="cannot be added"):
        metrics.add(Metric.SAVES_STARTED, -1)
    with pytest.raises(ValueError, match="last_complete_step is a gauge"):
        metrics.add(Metric.LAST_COMPLETE_STEP)
    with pytest.raises(ValueError, match="saves_started is a counter"):
        metrics.set(Metric.SAVES_STARTED, 1)
    metrics.set(Metric.LAST_COMPLETE_STEP, 7)
    assert metrics.snapshot()["last_complete_step"] == 7


def test_every_metric_has_its_own_name_and_says_what_it_is() -> None:
    specs = [metric.value for metric in Metric]
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(spec.help for spec in specs)
