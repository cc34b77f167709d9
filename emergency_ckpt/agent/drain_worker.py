"""The drain worker of a trainer: what it is asked, and the thread that makes one attempt after the other.

What is drained when is the affair of `drain_schedule`; who chooses it, of `drain_turns`; how one attempt goes,
of `drain_attempt`. Nothing ends the thread but `close`, here or in the committer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from emergency_ckpt.agent.drain import DrainJob, Verdict
from emergency_ckpt.agent.drain_aftermath import Aftermath
from emergency_ckpt.agent.drain_attempt import Attempts, Manner
from emergency_ckpt.agent.drain_errors import DrainErrors
from emergency_ckpt.agent.drain_queue import Waiting
from emergency_ckpt.agent.drain_schedule import DrainSchedule
from emergency_ckpt.agent.drain_turns import Choosing, Listening
from emergency_ckpt.agent.drain_waits import DrainWaits
from emergency_ckpt.agent.drain_words import DrainWords
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import EmergencyCheckpointError, PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.telemetry.events import DrainEvent

_MANAGER_ENDS = "the manager ends"


class DrainWorker:
    """Drains pinned slots one after the other in a thread of its own."""

    def __init__(self, job: DrainJob) -> None:
        self._job = job
        self._schedule = schedule = DrainSchedule(job)
        self._changed = schedule.changed
        self._errors = DrainErrors(job.log)
        self._words = DrainWords(job, schedule.wait_closed)
        self._waits = DrainWaits(job, schedule)
        self._turns = (Choosing if job.commits else Listening)(schedule, self._words, self._errors)
        self._aftermath = Aftermath(job, self._errors)
        self._attempts = Attempts(
            job, self._words, self._errors, self._aftermath.tidy, lambda: self._waits.is_asked
        )
        self._spares: StepId | None = None  # the step of which these write as little as they can
        self._leaving: tuple[int, ...] = ()
        self._newest_committed: StepId | None = None
        self._thread = threading.Thread(target=self._run, name="emergency_ckpt drain", daemon=True)
        self._thread.start()

    # What there is.

    @property
    def newest_committed(self) -> StepId | None:
        """The step whose drain was the last to be committed; None before the first."""
        return self._newest_committed

    @property
    def busy(self) -> bool:
        """Whether a step is being drained, or waits for that, or for its next try."""
        return self._schedule.busy

    @property
    def retries(self) -> bool:
        """Whether a step waits for its next try, after one that failed."""
        with self._changed:
            schedule = self._schedule
            return bool(schedule.queue) and schedule.running is None and schedule.failures > 0

    @property
    def underway(self) -> tuple[StepId, float] | None:
        """The step that is being drained, and for how many seconds; 0 where one waits for its next try."""
        with self._changed:
            if self._schedule.running is not None:
                return self._schedule.running, time.monotonic() - self._schedule.since
            newest = self._schedule.queue.newest
            return None if newest is None else (newest, 0.0)

    @property
    def last_failure(self) -> Verdict | None:
        """How the last attempt failed; None where it did not."""
        return self._schedule.last_failure

    def describe(self) -> str:
        """What there is to drain, and what became of it so far, in words."""
        with self._changed:
            return self._schedule.describe()

    def take_errors(self) -> list[EmergencyCheckpointError]:
        """Errors since the last call, oldest first."""
        return self._errors.take()

    # What is to be done.

    def drain(self, step: StepId, slot: int | None) -> None:
        """Drains the sealed `step` from `slot`, which the caller has pinned; the worker unpins it.

        Where this process has lost the step (`slot` None), the attempt fails, and the others are told.
        All processes are told of the same steps in the same order (what is complete is agreed). Once this is
        closed a step is left to the agents, as all that waits then.
        """
        with self._changed:
            if self._schedule.closed == _MANAGER_ENDS:
                self._schedule.queue.unpin(slot)
                self._job.log.warning(
                    "drain", step.step, f"{step} is not drained by this process: {_MANAGER_ENDS}"
                )
                return
            self._schedule.add(step, slot)

    def spare(self, step: StepId, leaving: tuple[int, ...]) -> None:
        """The hosts of these processes go away: they write of `step` what no other one has, and nothing else.

        All processes say the same, before any of them is told to drain that step.
        """
        with self._changed:
            self._spares, self._leaving = step, leaving

    def make_room(self) -> bool:
        """A save finds no slot: steps that wait leave theirs; says whether there were any.

        The newest of them stays where it is as long as no newer step is complete.
        """
        with self._changed:
            return self._schedule.make_room()

    def give_up(self, reason: str, step: int | None = None) -> None:
        """What waits, or one step of it, is not drained any more. What is being drained is not cut.

        One step that is given up may be saved anew.
        """
        with self._changed:
            self._schedule.give_up(reason, step)
            committed = self._newest_committed
            if step is not None and committed is not None and committed.step == step:
                self._newest_committed = None  # It may be gone, and what is saved anew is another one.

    # Waiting.

    def wait(self, timeout: timedelta, interrupted: Callable[[], bool] | None = None) -> bool:
        """Waits until each step has been drained or has had a try, which does not wait for its time.

        False when the time limit came first, or `interrupted` was true, which is asked now and then. A step
        whose try failed is tried again later all the same.
        """
        return self._waits.wait(timeout, interrupted)

    def hold(self, timeout: timedelta) -> int | None:
        """As `wait`, in the committer; no attempt begins afterwards, until `release`.

        Returns how many attempts there were, None when the time limit came first.
        """
        return self._waits.hold(timeout)

    def release(self) -> None:
        """Attempts begin again."""
        self._waits.release()

    def wait_for(self, attempts: int, timeout: timedelta) -> bool:
        """The other processes' part of `hold`: waits until so many attempts have ended."""
        return self._waits.wait_for(attempts, timeout)

    def close(self) -> None:
        """Ends the thread, as soon as no drain is running; what waits is given up. Idempotent."""
        schedule = self._schedule
        with self._changed:
            if schedule.closed:
                return
            runs, listens = schedule.running is not None, not self._job.commits and schedule.expects
            first_without = schedule.ended + runs
            schedule.stop(_MANAGER_ENDS)
        if not self._job.commits:  # The committer may know of a step that this process has not been told of.
            self._words.leave(first_without)
        # The thread of a process that listens does so until the committer closes.
        self._thread.join(0.0 if runs or listens else 5.0)

    # In its thread.

    def _run(self) -> None:
        while (chosen := self._turns.next()) is not None:
            try:
                self._attempt(chosen)
            except Exception as error:  # Nothing must end the thread: others wait for this process.
                told = PersistentStoreError(f"draining {chosen.step} failed: {type(error).__name__}: {error}")
                told.__cause__ = error
                self._errors.keep(told)
                with self._changed:
                    self._schedule.end(chosen, Verdict("failed", str(told)))
        if self._job.commits:
            self._words.end(self._schedule.ended)

    def _attempt(self, chosen: Waiting) -> None:
        job, schedule, step, started = self._job, self._schedule, chosen.step, time.monotonic()
        attempt = Attempt(job.generation, step.step, job.item, schedule.ended)
        if chosen.slot is None:
            chosen = Waiting(step, schedule.queue.pin(step))
        manner = Manner(schedule.failures > 0, self._leaving if step == self._spares else ())
        verdict, nbytes = self._attempts.carry_out(attempt, chosen.slot, manner)
        job.log.emit(
            DrainEvent(
                step=step.step,
                bytes=nbytes,
                seconds=time.monotonic() - started,
                result=verdict.result,
                reason=verdict.reason,
            )
        )
        if verdict.result == "committed":
            self._newest_committed = step
            self._aftermath.call_back(step)
        elif job.commits:
            self._aftermath.note_failed(attempt, verdict)
        with self._changed:
            schedule.end(chosen, verdict)
