"""Which step of a trainer is drained next, and when: what waits, what is being drained, how the tries ended.

Steps are drained in their order; once the store fails, only the newest that is due waits, and what it overtakes
is given up. A step that waits leaves its slot to a save that finds none.
"""

from __future__ import annotations

import dataclasses
import threading
import time

from emergency_ckpt.agent.drain import DrainJob, Verdict
from emergency_ckpt.agent.drain_queue import DrainQueue, Waiting
from emergency_ckpt.core.jitter import JITTER
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import EmergencyCheckpointError


@dataclasses.dataclass(eq=False)
class Waiter:
    """Somebody who waits until what there is to drain has had a try.

    `before`: the attempts that had ended; `newest`: the newest step then. `holds`: none begins afterwards.
    `urged`: the attempt that the committer was last asked for. `over`: whether that try has been.
    """

    before: int
    newest: StepId | None
    holds: bool = False
    urged: int = -1
    over: bool = False


class DrainSchedule:
    """Whoever reads or changes several things at once, or calls what says so, has the lock `changed`.

    Attributes:
      running, since: the step that is being drained, and since when.
      ended: how many attempts have ended: all processes count them alike.
      awaited: how many this process was told will end.
      failures: in a row; last_failure: how the last attempt failed, None where it did not.
      closed: why no attempt begins any more.
    """

    def __init__(self, job: DrainJob) -> None:
        self._job = job
        self.changed = threading.Condition()
        self.queue = DrainQueue(job.local, job.log)
        self.running: StepId | None = None
        self.since = 0.0
        self.ended = 0
        self.awaited = 0
        self.failures = 0
        self.last_failure: Verdict | None = None
        self.closed = ""
        self.waiters: list[Waiter] = []
        self._last_step: StepId | None = None
        self._not_before = 0.0

    # What there is.

    @property
    def busy(self) -> bool:
        return bool(self.queue) or self.running is not None

    @property
    def expects(self) -> bool:
        """Whether there is an attempt to come, as far as this process knows."""
        return bool(self.queue) or self.awaited > self.ended

    def describe(self) -> str:
        """What there is to drain, and what became of it so far, in words. With the lock."""
        step, failure = self.running or self.queue.oldest, self.last_failure
        if step is None:
            return "nothing is left to drain"
        if failure is None or not self.failures:
            return f"{step} {'is being drained' if self.running else 'waits'}"
        does = "is being drained" if self.running else "waits for its next try"
        return f"{step} {does}, after {self.failures} that failed, the last one by {failure.reason}"

    # What comes in, and is given up.

    def add(self, step: StepId, slot: int | None) -> None:
        """A step is to be drained, from a slot that is pinned. With the lock."""
        if step == self.running or step in self.queue:
            self.queue.unpin(slot)  # It is on its way.
            self._not_before = 0.0
        elif self.queue.is_over(step):
            self.queue.unpin(slot)  # This process learns late that it is complete.
        elif self.closed:
            self.queue.unpin(slot)
            raise EmergencyCheckpointError(f"{step} is not drained: {self.closed}")
        else:
            self.queue.add(Waiting(step, slot))
            if self.failures:
                self.queue.keep_newest(f"{step} goes in its place")
        self.changed.notify_all()

    def make_room(self) -> bool:
        """Lets the newest step that waits go of its slot, and gives up the others. With the lock."""
        if self._job.keeps_waiting or not self.queue:
            return False
        self.queue.keep_newest("its slot is needed for a save")
        return self.queue.let_go_oldest()

    def give_up(self, reason: str, step: int | None) -> None:
        """What waits, or one step of it, which may be saved anew afterwards. With the lock."""
        self.queue.give_up(reason, lambda waiting: step in (None, waiting.step))
        if step is not None:
            self.queue.begin_anew()
        self.changed.notify_all()

    def stop(self, reason: str) -> None:
        """No attempt begins any more, and nobody waits for one. With the lock."""
        self.closed = reason
        self.queue.give_up(reason)
        self.changed.notify_all()

    def wait_closed(self, seconds: float) -> bool:
        """Waits for that; False where it did not come so soon."""
        with self.changed:
            return self.changed.wait_for(lambda: bool(self.closed), seconds)

    # When, and what.

    def is_over_for(self, waiter: Waiter) -> bool:
        """Whether what it waits for has had its try. With the lock."""
        last, newest = self._last_step, waiter.newest
        tried = self.ended > waiter.before and last is not None and newest is not None and last >= newest
        waiter.over = waiter.over or tried or not self.busy
        return waiter.over

    def pause(self) -> float:
        """How long no attempt begins, in seconds; 0 where one may. With the lock."""
        over = [self.is_over_for(waiter) for waiter in self.waiters]
        held = any(is_over and waiter.holds for is_over, waiter in zip(over, self.waiters, strict=True))
        if not self.queue or held:
            return float("inf")
        return max(self._not_before - time.monotonic(), 0.0) if all(over) else 0.0

    def end_pause(self) -> None:
        with self.changed:
            self._not_before = 0.0

    def take(self) -> Waiting:
        """The step that is next counts as running. With the lock."""
        chosen = self.queue.take()
        self.running, self.since = chosen.step, time.monotonic()
        return chosen

    def take_step(self, step: StepId) -> Waiting:
        """As `take`, for the step that the committer has chosen."""
        self.running, self.since = step, time.monotonic()
        return self.queue.take_step(step) or Waiting(step, None)

    def put_back(self, chosen: Waiting) -> None:
        """What was taken waits as before, unless nothing does any more: the attempt did not begin."""
        with self.changed:
            self.running = None
            if self.closed:
                self.queue.unpin(chosen.slot)
            else:
                self.queue.add(chosen)
            self.changed.notify_all()

    # How it ended.

    def end(self, chosen: Waiting, verdict: Verdict) -> None:
        """An attempt ended: its step is done with, or waits for its next try, or a newer one. With the lock."""
        step, self.running = chosen.step, None
        self.ended += 1
        overtaken = verdict.result == "superseded" and verdict.repeats and not self.closed
        if overtaken:
            self._wait_for_newer(chosen)
        elif verdict.result == "failed" and verdict.repeats and not self.closed:
            self._wait_for_next_try(chosen, verdict)
        else:
            self.failures, self._not_before = 0, 0.0
            self.last_failure = verdict if verdict.result == "failed" else None
            self.queue.unpin(chosen.slot)
            self.queue.end_until(step)
        if not (overtaken and self.queue.has_something):
            self._last_step = step
        waits, pause = self.queue.newest, self.pause()
        if self._job.commits and waits is not None and 0 < pause < float("inf"):
            self._job.log.info("drain", waits.step, f"the next try is in {pause:.0f} s")
        self.changed.notify_all()

    def _wait_for_newer(self, chosen: Waiting) -> None:
        self.queue.unpin(chosen.slot)
        self.queue.add(Waiting(chosen.step, None, overtaken=True))
        self.queue.keep_newest("a newer step goes in its place")
        pause = 0.0 if self.queue.has_something else self._job.pauses.before(1, "other", 0.5)
        self._not_before = time.monotonic() + pause

    def _wait_for_next_try(self, chosen: Waiting, verdict: Verdict) -> None:
        self.failures, self.last_failure = self.failures + 1, verdict
        pause = self._job.pauses.before(self.failures, verdict.cause, JITTER.random())
        self._not_before = time.monotonic() + pause
        self.queue.add(chosen)
        self.queue.keep_newest("a newer step goes in its place")
        if self._job.lets_go:
            self.queue.let_go_oldest()
