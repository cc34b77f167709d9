"""Waiting for drains: until what there is has had a try, with or without others to begin afterwards.

Nobody waits for a pause: who waits where the committer does not see it urges him.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from emergency_ckpt.agent.drain import DrainJob
from emergency_ckpt.agent.drain_schedule import DrainSchedule, Waiter
from emergency_ckpt.errors import EmergencyCheckpointError

_LOOK_SECONDS = 0.5


class DrainWaits:
    """Safe to use from any thread."""

    def __init__(self, job: DrainJob, schedule: DrainSchedule) -> None:
        self._job = job
        self._schedule = schedule
        self._changed = schedule.changed

    @property
    def is_asked(self) -> bool:
        """Whether somebody waits in order to hear what becomes of a step."""
        with self._changed:
            return any(not waiter.holds for waiter in self._schedule.waiters)

    def wait(self, timeout: timedelta, interrupted: Callable[[], bool] | None = None) -> bool:
        """Waits until each step has been drained or has had a try.

        False when the time limit came first, or `interrupted` was true, which is asked now and then.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        with self._waiting() as waiter:
            while True:
                left = max(deadline - time.monotonic(), 0.0)
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._schedule.is_over_for(waiter) or self._may_urge(waiter),
                        left if interrupted is None else min(left, _LOOK_SECONDS),
                    )
                    if self._schedule.is_over_for(waiter):
                        return True
                    urges = self._may_urge(waiter)
                    if urges:
                        waiter.urged = self._schedule.ended
                if urges:
                    with contextlib.suppress(EmergencyCheckpointError):  # Then it comes in its time.
                        self._job.board.urge(self._job.generation.number, waiter.urged)
                if time.monotonic() >= deadline or (interrupted is not None and interrupted()):
                    return False

    def hold(self, timeout: timedelta) -> int | None:
        """As `wait`, in the committer; no attempt begins afterwards, until `release`.

        Returns how many attempts there were, None when the time limit came first.
        """
        with self._changed:
            waiter = self._begin(holds=True)
            if self._changed.wait_for(lambda: self._schedule.is_over_for(waiter), timeout.total_seconds()):
                self._schedule.queue.begin_anew()
                return self._schedule.ended
            self._schedule.waiters.remove(waiter)
            return None

    def release(self) -> None:
        """Attempts begin again."""
        with self._changed:
            self._schedule.waiters = [waiter for waiter in self._schedule.waiters if not waiter.holds]
            self._changed.notify_all()

    def wait_for(self, attempts: int, timeout: timedelta) -> bool:
        """The other processes' part of `hold`: waits until so many attempts have ended."""
        schedule = self._schedule
        with self._changed:
            schedule.awaited = max(schedule.awaited, attempts)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: schedule.ended >= attempts, timeout.total_seconds()):
                return False
            schedule.queue.begin_anew()
            return True

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[Waiter]:
        with self._changed:
            waiter = self._begin(holds=False)
        try:
            yield waiter
        finally:
            with self._changed:
                self._schedule.waiters.remove(waiter)

    def _begin(self, *, holds: bool) -> Waiter:
        """With the lock."""
        schedule = self._schedule
        waiter = Waiter(schedule.ended, schedule.queue.newest or schedule.running, holds)
        schedule.waiters.append(waiter)
        self._changed.notify_all()
        return waiter

    def _may_urge(self, waiter: Waiter) -> bool:
        """Whether the committer may be pausing, and does not know that somebody waits here."""
        schedule = self._schedule
        return not self._job.commits and schedule.running is None and waiter.urged != schedule.ended
