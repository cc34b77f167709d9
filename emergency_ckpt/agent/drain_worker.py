"""The drain worker of a trainer: which step goes to the persistent tier next, and when it is tried again.

Steps are drained in their order; once the store fails, only the newest that is due waits, and what it overtakes
is given up. The committer says which step each attempt is for, and every process takes part, so that all count
attempts alike. A step that waits leaves its slot to a save that finds none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from emergency_ckpt.agent.drain import DrainJob, Verdict
from emergency_ckpt.agent.drain_errors import DrainErrors
from emergency_ckpt.agent.drain_queue import DrainQueue, Waiting
from emergency_ckpt.agent.orders import Share
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import is_final, store_reason
from emergency_ckpt.errors import (
    CoordinationTimeoutError,
    CorruptDataError,
    EmergencyCheckpointError,
    PersistentStoreError,
    StaleGenerationError,
)
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.telemetry.events import DrainEvent, DrainResult

_MARGIN = timedelta(seconds=30)
_LOOK_SECONDS = 0.5
_MOST_LEFT = 64
_OVER = StepId(0, 0)
_MANAGER_ENDS = "the manager ends"
_JITTER = random.Random()


@dataclasses.dataclass(eq=False)
class _Waiter:
    """Somebody who waits until what there is to drain has had a try.

    `before`: the attempts that had ended; `newest`: the newest step then. `holds`: none begins afterwards.
    `urged`: the attempt that the committer was last asked for. `over`: whether that try has been.
    """

    before: int
    newest: StepId | None
    holds: bool = False
    urged: int = -1
    over: bool = False


class DrainWorker:
    """Drains pinned slots one after the other in a thread of its own."""

    def __init__(self, job: DrainJob) -> None:
        self._job = job
        self._changed = threading.Condition()
        self._queue = DrainQueue(job.local, job.log)
        self._running: StepId | None = None
        self._since = 0.0  # when that began
        self._spares: StepId | None = None  # the step of which these write as little as they can
        self._leaving: tuple[int, ...] = ()
        self._ended = 0  # attempts
        self._last_step: StepId | None = None
        self._failures = 0  # in a row
        self._last_failure: Verdict | None = None
        self._not_before = 0.0
        self._waiters: list[_Waiter] = []
        self._early: set[StepId] = set()  # that were called for before this process was told of them
        self._left: list[Attempt] = []  # that failed, and may have left something
        self._newest_committed: StepId | None = None
        self._errors = DrainErrors(job.log)
        self._closed = ""  # why no attempt begins any more
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
        return bool(self._queue) or self._running is not None

    @property
    def retries(self) -> bool:
        """Whether a step waits for its next try, after one that failed."""
        with self._changed:
            return bool(self._queue) and self._running is None and self._failures > 0

    @property
    def underway(self) -> tuple[StepId, float] | None:
        """The step that is being drained, and for how many seconds; 0 where one waits for its next try."""
        with self._changed:
            if self._running is not None:
                return self._running, time.monotonic() - self._since
            newest = self._queue.newest
            return None if newest is None else (newest, 0.0)

    @property
    def last_failure(self) -> Verdict | None:
        """How the last attempt failed; None where it did not."""
        return self._last_failure

    def describe(self) -> str:
        """What there is to drain, and what became of it so far, in words."""
        with self._changed:
            step, failure = self._running or self._queue.oldest, self._last_failure
            if step is None:
                return "nothing is left to drain"
            if failure is None or not self._failures:
                return f"{step} {'is being drained' if self._running else 'waits'}"
            does = "is being drained" if self._running else "waits for its next try"
            return f"{step} {does}, after {self._failures} that failed, the last one by {failure.reason}"

    def drain(self, step: StepId, slot: int | None) -> None:
        """Drains the sealed `step` from `slot`, which the caller has pinned; the worker unpins it.

        Where this process has lost the step (`slot` None), the attempt fails, and the others are told.
        All processes are told of the same steps in the same order (what is complete is agreed). Once this is
        closed a step is left to the agents, as all that waits then.
        """
        with self._changed:
            if self._closed == _MANAGER_ENDS:
                self._queue.unpin(slot)
                self._job.log.warning(
                    "drain", step.step, f"{step} is not drained by this process: {_MANAGER_ENDS}"
                )
                return
            if self._closed:
                self._queue.unpin(slot)
                raise EmergencyCheckpointError(f"{step} is not drained: {self._closed}")
            if step in self._early or step == self._running or step in self._queue:
                self._queue.unpin(slot)  # It is on its way, or this process learns late that it is complete.
                self._early.discard(step)
                self._not_before = 0.0
            else:
                self._queue.add(Waiting(step, slot))
                if self._failures:
                    self._queue.keep_newest(f"{step} goes in its place")
            self._changed.notify_all()

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
            if self._job.keeps_waiting or not self._queue:
                return False
            self._queue.keep_newest("its slot is needed for a save")
            return self._queue.let_go_oldest()

    def give_up(self, reason: str, step: int | None = None) -> None:
        """What waits, or one step of it, is not drained any more. What is being drained is not cut."""
        with self._changed:
            self._queue.give_up(reason, lambda waiting: step in (None, waiting.step))
            self._changed.notify_all()

    def take_errors(self) -> list[EmergencyCheckpointError]:
        """Errors since the last call, oldest first."""
        return self._errors.take()

    def wait(self, timeout: timedelta, interrupted: Callable[[], bool] | None = None) -> bool:
        """Waits until each step has been drained or has had a try, which does not wait for its time.

        False when the time limit came first, or `interrupted` was true, which is asked now and then. A step
        whose try failed is tried again later all the same.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        with self._waiting() as waiter:
            while True:
                left = max(deadline - time.monotonic(), 0.0)
                look = left if interrupted is None else min(left, _LOOK_SECONDS)
                if self._await(waiter, timedelta(seconds=look)):
                    return True
                if time.monotonic() >= deadline or (interrupted is not None and interrupted()):
                    return False

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[_Waiter]:
        with self._changed:
            waiter = self._begin_to_wait(holds=False)
        try:
            yield waiter
        finally:
            with self._changed:
                self._waiters.remove(waiter)

    def _begin_to_wait(self, *, holds: bool) -> _Waiter:
        """With the lock."""
        waiter = _Waiter(self._ended, self._queue.newest or self._running, holds)
        self._waiters.append(waiter)
        self._changed.notify_all()
        return waiter

    def _await(self, waiter: _Waiter, timeout: timedelta) -> bool:
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_over_for(waiter) or self._may_urge(waiter),
                    max(deadline - time.monotonic(), 0.0),
                )
                if self._is_over_for(waiter) or not self._may_urge(waiter):
                    return self._is_over_for(waiter)
                waiter.urged = self._ended
            with contextlib.suppress(EmergencyCheckpointError):  # Then it comes in its time.
                self._job.board.urge(self._job.generation.number, waiter.urged)

    def _is_over_for(self, waiter: _Waiter) -> bool:
        """Whether what it waits for has had its try; with the lock."""
        last, newest = self._last_step, waiter.newest
        tried = self._ended > waiter.before and last is not None and newest is not None and last >= newest
        waiter.over = waiter.over or tried or not self.busy
        return waiter.over

    def _may_urge(self, waiter: _Waiter) -> bool:
        """Whether the committer may be pausing, and does not know that somebody waits here."""
        return not self._commits and self._running is None and waiter.urged != self._ended

    def hold(self, timeout: timedelta) -> int | None:
        """As `wait`, in the committer; no attempt begins afterwards, until `release`.

        Returns how many attempts there were, None when the time limit came first.
        """
        with self._changed:
            waiter = self._begin_to_wait(holds=True)
            if self._changed.wait_for(lambda: self._is_over_for(waiter), timeout.total_seconds()):
                return self._ended
            self._waiters.remove(waiter)
            return None

    def release(self) -> None:
        """Attempts begin again."""
        with self._changed:
            self._waiters = [waiter for waiter in self._waiters if not waiter.holds]
            self._changed.notify_all()

    def wait_for(self, attempts: int, timeout: timedelta) -> bool:
        """The other processes' part of `hold`: waits until so many attempts have ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended >= attempts, timeout.total_seconds())

    def close(self) -> None:
        """Ends the thread, as soon as no drain is running; what waits is given up. Idempotent."""
        with self._changed:
            if self._closed:
                return
            # The thread of another process than the committer's listens until that one closes.
            ends_soon = self._running is None and (self._commits or not self._queue)
            self._stop(_MANAGER_ENDS)
        self._thread.join(5.0 if ends_soon else 0.0)

    def _stop(self, reason: str) -> None:
        """No attempt begins any more, and nobody waits for one; with the lock."""
        self._closed = reason
        self._queue.give_up(reason)
        self._changed.notify_all()

    # In its thread.

    @property
    def _commits(self) -> bool:
        return self._job.process == self._job.committer

    def _run(self) -> None:
        choose = self._choose if self._commits else self._listen
        while (attempt := choose()) is not None:
            try:
                self._do(attempt)
            except Exception as error:  # Nothing must end the thread: others wait for this process.
                told = PersistentStoreError(f"draining {attempt.step} failed: {type(error).__name__}: {error}")
                told.__cause__ = error
                self._errors.keep(told)
                with self._changed:
                    self._end(attempt, Verdict("failed", str(told)))
        if self._commits:  # Others may wait for the next attempt.
            with contextlib.suppress(EmergencyCheckpointError):
                self._job.board.call(self._job.generation.number, self._ended, _OVER)

    def _choose(self) -> Waiting | None:
        """In the committer: what the next attempt is for, which counts as running; None when closed."""
        while True:
            with self._changed:
                if self._closed:
                    return None
                pause, ordinal = self._pause(), self._ended
                if pause <= 0:
                    chosen = self._queue.take()
                    self._running, self._since = chosen.step, time.monotonic()
                    return chosen
                if pause == float("inf"):
                    self._changed.wait()
                    continue
                self._changed.wait(min(pause, _LOOK_SECONDS))
            with contextlib.suppress(EmergencyCheckpointError):
                if self._job.board.is_urged(self._job.generation.number, ordinal):
                    with self._changed:
                        self._not_before = 0.0

    def _pause(self) -> float:
        """How long no attempt begins, in seconds; 0 where one may. With the lock."""
        over = [self._is_over_for(waiter) for waiter in self._waiters]
        held = any(is_over and waiter.holds for is_over, waiter in zip(over, self._waiters, strict=True))
        if not self._queue or held:
            return float("inf")
        return max(self._not_before - time.monotonic(), 0.0) if all(over) else 0.0

    def _listen(self) -> Waiting | None:
        """In the others: what the committer says that the next attempt is for; None when either is closed."""
        board, generation = self._job.board, self._job.generation.number
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._closed or self._queue))
                if self._closed:
                    return None
                ordinal = self._ended
            try:
                called = board.await_call(generation, ordinal, self._call_timeout)
            except CoordinationTimeoutError:
                continue  # The store may fail for long.
            except EmergencyCheckpointError as error:
                self._errors.keep(error)
                with self._changed:
                    self._queue.give_up("the other processes cannot be reached")
                    self._changed.notify_all()
                continue
            with self._changed:
                if called == _OVER and not self._closed:
                    self._stop("process 0 ends its drains")
                if self._closed:
                    return None
                self._running, self._since = called, time.monotonic()
                waiting = self._queue.take_step(called)
                if waiting is None:
                    self._early.add(called)
                return waiting or Waiting(called, None)

    @property
    def _call_timeout(self) -> timedelta:
        return self._job.timeout + timedelta(seconds=1.5 * self._job.pauses.longest) + _MARGIN

    def _do(self, chosen: Waiting) -> None:
        job, started, step = self._job, time.monotonic(), chosen.step
        attempt = Attempt(job.generation, step.step, job.item, self._ended)
        if self._commits:
            with contextlib.suppress(EmergencyCheckpointError):  # Then no part comes, and the attempt fails.
                job.board.call(job.generation.number, self._ended, step)
        if chosen.slot is None:
            chosen = Waiting(step, self._queue.pin(step))
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

    def _end(self, chosen: Waiting, verdict: Verdict) -> None:
        """An attempt ended; with the lock."""
        step, self._running = chosen.step, None
        self._ended += 1
        self._early = {early for early in self._early if early >= step}
        overtaken = verdict.result == "superseded" and verdict.repeats and not self._closed
        if overtaken:
            self._queue.unpin(chosen.slot)
            self._queue.add(Waiting(step, None, overtaken=True))
            self._queue.keep_newest("a newer step goes in its place")
            has_newer = self._queue.has_something
            self._not_before = 0.0 if has_newer else time.monotonic() + self._job.pauses.before(1, "other", 0.5)
        elif verdict.result == "failed" and verdict.repeats and not self._closed:
            self._wait_for_next_try(chosen, verdict)
        else:
            self._failures, self._not_before = 0, 0.0
            self._last_failure = verdict if verdict.result == "failed" else None
            self._queue.unpin(chosen.slot)
            self._queue.forget_until(step)
        if not (overtaken and self._queue.has_something):
            self._last_step = step
        waits, pause = self._queue.newest, self._pause()
        if self._commits and waits is not None and 0 < pause < float("inf"):
            self._job.log.info("drain", waits.step, f"the next try is in {pause:.0f} s")
        self._changed.notify_all()

    def _wait_for_next_try(self, chosen: Waiting, verdict: Verdict) -> None:
        self._failures, self._last_failure = self._failures + 1, verdict
        pause = self._job.pauses.before(self._failures, verdict.cause, _JITTER.random())
        self._not_before = time.monotonic() + pause
        self._queue.add(chosen)
        self._queue.keep_newest("a newer step goes in its place")
        if self._job.lets_go:
            self._queue.let_go_oldest()

    def _drain(self, attempt: Attempt, index: int | None) -> tuple[Verdict, int]:
        job, step = self._job, attempt.step_id
        if (stands := job.board.peek(attempt)) is not None:
            return self._heard(attempt, stands), 0  # This process comes late.
        if index is None:
            if job.repeats and any(complete > step for complete in job.local.complete_steps()):
                why = f"process {job.process}: its slot was needed, a newer step goes in its place"
                said = Verdict("superseded", why, repeats=True)
                return self._heard(attempt, job.board.announce(attempt, said)), 0
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
            leaving=self._leaving if step == self._spares else (),
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
        return self._heard(attempt, self._job.board.wait(attempt, self._job.timeout + _MARGIN))

    def _heard(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        """Keeps what others say of a failure for `check_for_errors`."""
        if verdict.result == "failed":
            self._note(attempt.step_id, verdict, PersistentStoreError(f"{attempt} failed: {verdict.reason}"))
        return verdict

    def _failed(self, attempt: Attempt, error: EmergencyCheckpointError) -> Verdict:
        """Tells the others, so that nobody waits, and keeps the error for `check_for_errors`."""
        result: DrainResult = "superseded" if isinstance(error, StaleGenerationError) else "failed"
        repeats = self._job.repeats and not is_final(error)
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

    # After it.

    def _note(self, step: StepId, verdict: Verdict, error: EmergencyCheckpointError) -> None:
        with self._changed:
            asked = any(not waiter.holds for waiter in self._waiters)
        self._errors.failed(step, verdict, error, asked=asked)

    def _tidy(self, step: StepId) -> None:
        """After a commit: older steps, and what failed attempts left. Whatever fails, the commit stands."""
        left, self._left = self._left, []
        try:
            self._job.on_commit()
            for attempt in left:
                self._job.abandon(attempt)
        except (EmergencyCheckpointError, OSError) as error:
            told = PersistentStoreError(f"after the commit of {step}, old steps could not be deleted: {error}")
            self._errors.after_commit("retention", step, told, error)

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
            self._errors.after_commit("drain", step, told, error)
