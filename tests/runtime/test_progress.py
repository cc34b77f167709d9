"""What a trainer tells of its progress: the step, how long it takes, and that pauses are no part of it."""

from __future__ import annotations

import os

from emergency_ckpt.core.stalls import StallLimits
from emergency_ckpt.runtime.progress import TrainingProgress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made() -> tuple[TrainingProgress, Clock]:
    clock = Clock()
    return TrainingProgress(StallLimits(), last_call=True, clock=clock), clock


def told(progress: TrainingProgress) -> tuple[int | None, str, float, float | None]:
    said = progress.said()
    return said.step, said.phase, said.seconds, said.median_seconds


def test_a_step_counts_from_when_it_was_asked_about_first() -> None:
    progress, clock = made()
    progress.expect()
    clock.now += 40  # Compilation, say.
    assert told(progress) == (None, "training", 40, None)
    for step, seconds in ((5, 1), (6, 3), (7, 5)):
        progress.note(step)
        progress.note(step)  # `save` and `reached_preemption` both ask.
        clock.now += seconds
    assert told(progress) == (7, "training", 5, 2)
    assert progress.said().pid == os.getpid()


def test_a_pause_is_told_and_is_no_part_of_a_step() -> None:
    progress, clock = made()
    progress.note(1)
    clock.now += 2
    with progress.paused():
        clock.now += 100
        with progress.paused():
            clock.now += 100
        assert told(progress)[:2] == (1, "paused")
    assert told(progress) == (1, "training", 2, None)
    clock.now += 1
    progress.note(2)
    assert told(progress) == (2, "training", 0, 3)
    with progress.paused():
        clock.now += 5
        progress.note(3)
        clock.now += 100
    assert told(progress) == (3, "training", 0, 4)


def test_a_restore_begins_anew_and_the_last_step_is_followed_by_a_pause() -> None:
    progress, clock = made()
    for step in (1, 2):
        progress.note(step)
        clock.now += 2
    with progress.paused():
        clock.now += 50
        progress.begin_anew()
        clock.now += 50
    clock.now += 1
    assert told(progress) == (None, "training", 1, None), "a first step is to come after a restore, too"
    progress.note(2)
    progress.end()
    assert told(progress)[:2] == (2, "paused")
    progress.begin_anew()  # The best step is restored, say, and evaluated.
    assert told(progress)[:2] == (None, "paused")
    progress.note(3)
    assert told(progress)[:2] == (3, "training")


def test_nothing_is_expected_of_a_manager_that_trains_nothing() -> None:
    progress, clock = made()
    for _ in range(2):
        clock.now += 10_000
        assert told(progress)[:2] == (None, "paused")
        progress.begin_anew()  # One that restores, and evaluates.
    with progress.paused():
        progress.expect()
        clock.now += 5
    clock.now += 1
    assert told(progress) == (None, "training", 1, None)


def test_where_nobody_makes_anything_of_it_nobody_is_told() -> None:
    off = StallLimits(10.0, 0.0)
    assert not TrainingProgress(off, last_call=False).matters
    assert TrainingProgress(off, last_call=True).matters
    assert TrainingProgress(StallLimits(), last_call=False).matters
