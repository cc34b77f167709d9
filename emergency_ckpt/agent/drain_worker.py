"""The drain worker of a trainer: which step goes to the persistent tier next, and when it is tried again.

Steps are drained in their order; once the store fails, only the newest that is due waits, and what it overtakes
is given up. The committer says which step each attempt is for, and every process takes part, so that all count
attempts alike. A step that waits while another one is drained leaves its slot to a save that finds none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Iterable
from datetime import timedelta

from emergency_ckpt.agent.drain import DrainJob, Verdict
from emergency_ckpt.agent.orders import Share
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import StoreReason, store_error, store_reason
from emergency_ckpt.errors import (
    CoordinationTimeoutError,
    CorruptDataError,
    EmergencyCheckpointError,
    LocalDirectoryError,
    PersistentStoreError,
    StaleGenerationError,
)
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.telemetry.events import DrainEvent, DrainResult

_MARGIN = timedelta(seconds=30)
_MOST_LEFT = 64
_OVER = StepId(0, 0)
_JITTER = random.Random()


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A step and the slot that is pinned for it; None where it has none."""

    step: StepId
    slot: int | None


class DrainWorker:
    """Drains pinned slots one after the other in a thread of its own."""

    def __init__(self, job: DrainJob) -> None:
        self._job = job
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []  # ascending
        self._running: StepId | None = None
        self._ended = 0  # attempts
        self._last_step: StepId | None = None
        self._failures = 0  # in a row
        self._not_before = 0.0
        self._last_reason: StoreReason = "other"
        self._waiters = 0
        self._told: tuple[StepId, str] | None = None
        self._early: set[StepId] = set()  # that were called for before this process was told of them
        self._left: list[Attempt] = []  # that failed, and may have left something
        self._newest_committed: StepId | None = None
        self._errors: list[EmergencyCheckpointError] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="emergency_ckpt drain", daemon=True)
        self._thread.start()

    # What is asked of it.

    @property
    def newest_committed(self) -> StepId | None:
        """The step whose drain was the last to be committed; None before the first."""
        return self._newest_committed

    @property
    def busy(self) -> bool:
        """Whether a step is being drained, or waits for that, or for its next try."""
        return bool(self._waiting) or self._running is not None

    @property
    def retries(self) -> bool:
        """Whether a step waits for its next try, after one that failed."""
        with self._changed:
            return bool(self._waiting) and self._running is None and self._failures > 0

    @property
    def last_reason(self) -> StoreReason:
        """Why the last attempt failed; "other" where it did not."""
        return self._last_reason

    def drain(self, step: StepId, slot: int | None) -> None:
        """Drains the sealed `step` from `slot`, which the caller has pinned; the worker unpins it.

        Where this process has lost the step (`slot` None), the attempt fails, and the others are told.
        All processes are told of the same steps in the same order (what is complete is agreed).
        """
        with self._changed:
            if self._closed:
                self._unpin(slot)
                raise EmergencyCheckpointError(f"the drain worker has ended and takes no {step}")
            if step in self._early or step in (self._running, *(w.step for w in self._waiting)):
                self._unpin(slot)  # It is on its way, or this process learns late that it is complete.
                self._early.discard(step)
                self._not_before = 0.0
            else:
                self._waiting.append(_Waiting(step, slot))
                if self._failures:
                    self._keep_newest(f"{step} goes in its place")
            self._changed.notify_all()

    def make_room(self) -> bool:
        """A save finds no slot: steps that wait behind another one leave theirs; says whether there were any.

        The newest of them stays where it is as long as no newer step is complete.
        """
        with self._changed:
            if self._running is None or self._job.keeps_waiting or not self._waiting:
                return False
            self._keep_newest("its slot is needed for a save")
            left = self._waiting[0].slot is not None
            self._let_go(self._waiting[0])
            return left

    def take_errors(self) -> list[EmergencyCheckpointError]:
        """Errors since the last call, oldest first."""
        with self._changed:
            errors, self._errors = self._errors, []
        return errors

    def wait(self, timeout: timedelta) -> bool:
        """Waits until each step has been drained or has had a try, which does not wait for its time.

        False when the time limit came first. A step whose try failed is tried again later all the same.
        """
        with self._changed:
            return self._wait(timeout)

    def wait_and_end(self, timeout: timedelta) -> int | None:
        """As `wait`, in the committer; what is left to drain then is given up. Returns how many attempts there
        were, None when the time limit came first."""
        with self._changed:
            if not self._wait(timeout):
                return None
            self._give_up(self._waiting, "its drain failed, and others wait")
            return self._ended

    def wait_for(self, attempts: int, timeout: timedelta) -> bool:
        """The other processes' part of `wait_and_end`: waits until so many attempts have ended."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._ended >= attempts, timeout.total_seconds())
            if done:
                self._give_up(self._waiting, "its drain failed, and others wait")
            return done

    def _wait(self, timeout: timedelta) -> bool:
        before = self._ended
        newest = self._waiting[-1].step if self._waiting else self._running

        def tried() -> bool:
            last = self._last_step
            return self._ended > before and last is not None and newest is not None and last >= newest

        self._waiters += 1
        self._changed.notify_all()
        try:
            return self._changed.wait_for(lambda: not self.busy or tried(), timeout.total_seconds())
        finally:
            self._waiters -= 1

    def close(self, timeout: timedelta) -> bool:
        """Ends the thread, as soon as no drain is running; False when the time limit came first."""
        done = self.wait(timeout) if timeout else not self.busy
        with self._changed:
            if self._closed:
                return done
            self._closed = True
            self._give_up(self._waiting, "the manager ends")
            self._changed.notify_all()
        if self._commits:  # Others may wait for the next attempt.
            with contextlib.suppress(EmergencyCheckpointError):
                self._job.board.call(self._job.generation.number, self._ended, _OVER)
        self._thread.join(5.0 if done else 0.0)
        return done

    # In its thread.

    @property
    def _commits(self) -> bool:
        return self._job.process == self._job.committer

    def _run(self) -> None:
        while (attempt := self._next()) is not None:
            try:
                self._do(attempt)
            except Exception as error:  # Nothing must end the thread: others wait for this process.
                told = PersistentStoreError(f"draining {attempt.step} failed: {type(error).__name__}: {error}")
                told.__cause__ = error
                with self._changed:
                    self._errors.append(told)
                    self._end(attempt, Verdict("failed", str(told)))

    def _next(self) -> _Waiting | None:
        """What the next attempt is for, which counts as running from now on; None when this was closed."""
        while True:
            with self._changed:
                while not self._closed and (pause := self._pause()) > 0:
                    self._changed.wait(min(pause, threading.TIMEOUT_MAX))
                if self._closed:
                    return None
                if self._commits:
                    chosen = self._waiting.pop(0)
                    self._running = chosen.step
                    chosen = self._chosen(chosen)
                    self._running = chosen.step
                    return chosen
            try:
                called = self._job.board.await_call(
                    self._job.generation.number, self._ended, self._call_timeout
                )
            except CoordinationTimeoutError:
                continue  # The store may fail for long.
            except EmergencyCheckpointError as error:
                with self._changed:
                    self._errors.append(error)
                    self._give_up(self._waiting, "the other processes cannot be reached")
                continue
            with self._changed:
                if self._closed or called == _OVER:
                    return None
                self._running = called
                self._give_up([w for w in self._waiting if w.step < called], f"{called} goes in its place")
                if self._waiting and self._waiting[0].step == called:
                    return self._waiting.pop(0)
                self._early.add(called)
                return _Waiting(called, None)

    @property
    def _call_timeout(self) -> timedelta:
        return self._job.timeout + timedelta(seconds=1.5 * self._job.pauses.longest) + _MARGIN

    def _pause(self) -> float:
        """How long no attempt begins; 0 where one may."""
        if not self._waiting:
            return float("inf")
        if not self._commits or self._waiters:
            return 0.0
        return max(self._not_before - time.monotonic(), 0.0)

    def _chosen(self, chosen: _Waiting) -> _Waiting:
        """The step that waited longest, or a newer one where its slot was needed meanwhile."""
        if chosen.slot is not None or (slot := self._pinned(chosen.step)) is not None:
            return chosen if chosen.slot is not None else _Waiting(chosen.step, slot)
        for newer in reversed(self._job.local.complete_steps()):
            if newer > chosen.step and (slot := self._pinned(newer)) is not None:
                waited = [w for w in self._waiting if w.step < newer]
                self._give_up([chosen, *waited], f"its slot was needed, {newer} goes in its place")
                if self._waiting and self._waiting[0].step == newer:
                    self._let_go(self._waiting.pop(0))
                return _Waiting(newer, slot)
        return chosen

    def _pinned(self, step: StepId) -> int | None:
        try:
            slot = self._job.local.pin(step)
        except LocalDirectoryError as error:
            self._job.log.error("drain", step.step, str(error))
            return None
        return slot.index if slot else None

    def _do(self, chosen: _Waiting) -> None:
        job, started, step = self._job, time.monotonic(), chosen.step
        attempt = Attempt(job.generation, step.step, job.item, self._ended)
        if self._commits:
            with contextlib.suppress(EmergencyCheckpointError):  # Then no part comes, and the attempt fails.
                job.board.call(job.generation.number, self._ended, step)
        if chosen.slot is None:
            chosen = _Waiting(step, self._pinned(step))
        try:
            verdict, nbytes = self._drain(attempt, chosen.slot)
        except EmergencyCheckpointError as error:
            verdict, nbytes = self._failed(attempt, error), 0
        except Exception as error:  # The others wait for a verdict, whatever it was.
            wrapped = PersistentStoreError(f"draining {step} failed: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            verdict, nbytes = self._failed(attempt, wrapped), 0
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
            self._call_back(step)
        elif self._commits:
            self._left = [*self._left, attempt][-_MOST_LEFT:]
        with self._changed:
            self._end(chosen, verdict)

    def _end(self, chosen: _Waiting, verdict: Verdict) -> None:
        """An attempt ended; called with the lock."""
        step = self._last_step = chosen.step
        self._running = None
        self._ended += 1
        self._last_reason = verdict.cause
        self._early = {early for early in self._early if early >= step}
        if verdict.result == "failed" and verdict.repeats:
            self._failures += 1
            pause = self._job.pauses.before(self._failures, verdict.cause, _JITTER.random())
            self._not_before = time.monotonic() + pause
            self._waiting.insert(0, chosen)
            self._keep_newest("a newer step goes in its place")
            if self._job.lets_go:
                self._let_go(self._waiting[0])
            if self._commits and not self._waiters:
                self._job.log.info("drain", self._waiting[0].step.step, f"the next try is in {pause:.0f} s")
        else:
            self._failures, self._not_before = 0, 0.0
            self._let_go(chosen)
            self._waiting = [w for w in self._waiting if w.step > step or self._let_go(w)]
        self._changed.notify_all()

    def _drain(self, attempt: Attempt, index: int | None) -> tuple[Verdict, int]:
        job, step = self._job, attempt.step_id
        if (stands := job.board.peek(attempt)) is not None:
            return stands, 0  # This process comes late.
        if index is None:
            raise CorruptDataError(f"{step} is not on this ramdisk any more")
        slot = job.local.sealed(step)
        if slot is None or slot.index != index:
            raise CorruptDataError(f"{step} is no longer sealed in slot {index}")
        share = Share(
            step=attempt.step,
            ordinal=attempt.ordinal,
            layout=slot.layout.hash,
            position=job.process,
            holders=tuple(range(slot.layout.process_count)),
            commits=self._commits,
            retry=self._failures > 0,
        )
        # Only the committer waits for others, and so for their failures.
        stop = (lambda: self._given_up(attempt)) if share.commits else (lambda: None)
        nbytes = job.runner.run(share, slot, stop)
        if share.commits:
            self._tidy(step)
            return job.board.announce(attempt, Verdict("committed")), nbytes
        return self._await_verdict(attempt), nbytes

    def _given_up(self, attempt: Attempt) -> str | None:
        stands = self._job.board.peek(attempt)
        return stands.reason if stands else None

    def _await_verdict(self, attempt: Attempt) -> Verdict:
        # The committer gives up after its own time limit and says so; a margin lets that be heard.
        verdict = self._job.board.wait(attempt, self._job.timeout + _MARGIN)
        if verdict.result == "failed":
            self._note(attempt.step_id, verdict, PersistentStoreError(f"{attempt} failed: {verdict.reason}"))
        return verdict

    def _failed(self, attempt: Attempt, error: EmergencyCheckpointError) -> Verdict:
        """Tells the others, so that nobody waits, and keeps the error for `check_for_errors`."""
        result: DrainResult = "superseded" if isinstance(error, StaleGenerationError) else "failed"
        # What is damaged or lost here stays so; what is wrong with the store may pass.
        repeats = result == "failed" and not isinstance(error, CorruptDataError) and self._job.repeats
        said = Verdict(result, f"process {self._job.process}: {error}", store_reason(error), repeats)
        try:
            # Where nobody answered in time, somebody may be at work still.
            heard = isinstance(error, CoordinationTimeoutError)
            stands = said if heard else self._job.board.announce(attempt, said)
        except EmergencyCheckpointError as unheard:
            reason = f"{said.reason} (and the others could not be told: {unheard})"
            stands = Verdict(result, reason, said.cause, False)
        if stands.result == "failed":
            self._note(attempt.step_id, stands, error)
        return stands

    # What is told.

    def _note(self, step: StepId, verdict: Verdict, error: EmergencyCheckpointError) -> None:
        """An error is told once for each step and cause, and again to whoever waits for the drain."""
        again = " It is tried again, or a newer step in its place." if verdict.repeats else ""
        told = store_error(
            verdict.cause, f"{step} did not reach the persistent tier: {_sentence(error)}{again}"
        )
        told.__cause__ = error
        with self._changed:
            if self._waiters or self._told != (step, verdict.cause):
                self._errors.append(told)
            self._told = (step, verdict.cause)

    def _tidy(self, step: StepId) -> None:
        """After a commit: older steps, and what failed attempts left. Whatever fails, the commit stands."""
        left, self._left = self._left, []
        try:
            self._job.on_commit()
            for attempt in left:
                self._job.abandon(attempt)
        except (EmergencyCheckpointError, OSError) as error:
            told = PersistentStoreError(f"after the commit of {step}, old steps could not be deleted: {error}")
            self._note_after_commit("retention", step, told, error)

    def _call_back(self, step: StepId) -> None:
        """The user's callback after a commit; whatever it raises, the commit stands."""
        if self._job.after_commit is None:
            return
        try:
            self._job.after_commit()
        except Exception as error:
            told = EmergencyCheckpointError(
                f"{step} was committed, but the callback after it failed: {type(error).__name__}: {error}"
            )
            self._note_after_commit("drain", step, told, error)

    def _note_after_commit(
        self, operation: str, step: StepId, told: EmergencyCheckpointError, cause: Exception
    ) -> None:
        told.__cause__ = cause
        self._job.log.error(operation, step.step, str(told))
        with self._changed:
            self._errors.append(told)

    # What waits. Called with the lock.

    def _keep_newest(self, reason: str) -> None:
        self._give_up(self._waiting[:-1], reason)

    def _give_up(self, waiting: Iterable[_Waiting], reason: str) -> None:
        """These steps are not drained."""
        given_up = list(waiting)
        self._waiting = [w for w in self._waiting if w not in given_up]
        for each in given_up:
            self._let_go(each)
            said = f"{each.step} is given up: {reason}"
            self._job.log.emit(
                DrainEvent(step=each.step.step, bytes=0, seconds=0.0, result="superseded", reason=said)
            )

    def _let_go(self, waiting: _Waiting) -> None:
        slot, waiting.slot = waiting.slot, None
        self._unpin(slot)

    def _unpin(self, slot: int | None) -> None:
        if slot is not None:
            self._job.local.unpin(slot)


def _sentence(error: Exception) -> str:
    text = str(error)
    return text if text.endswith(".") else f"{text}."
