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
from typing import TypeVar

from emergency_ckpt.agent.drain import OVER, DrainJob, Verdict
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

_LOOK_SECONDS = 0.5
_IDLE_SECONDS = 5.0
_LAST_TRIES = 3
_ABANDONED_AT_ONCE = 64
_T = TypeVar("_T")
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
        self._awaited = 0  # attempts that this process was told will end
        self._left: list[Attempt] = []  # that failed, and may have left something
        self._newest_committed: StepId | None = None
        self._errors = DrainErrors(job.log)
        self._lost = ""  # what went wrong between two attempts
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
        All processes are told of the same steps in the same order (what is complete is agreed).
        """
        with self._changed:
            if self._closed:
                self._queue.unpin(slot)
                raise EmergencyCheckpointError(f"{step} is not drained: {self._closed}")
            if step == self._running or step in self._queue:
                self._queue.unpin(slot)  # It is on its way.
                self._not_before = 0.0
            elif self._queue.is_over(step):
                self._queue.unpin(slot)  # This process learns late that it is complete.
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
        """What waits, or one step of it, is not drained any more. What is being drained is not cut.

        One step that is given up may be saved anew.
        """
        with self._changed:
            self._queue.give_up(reason, lambda waiting: step in (None, waiting.step))
            if step is not None:
                self._queue.begin_anew()
            self._changed.notify_all()

    def take_errors(self) -> list[EmergencyCheckpointError]:
        """Errors since the last call, oldest first."""
        return self._errors.take()

    def wait(self, timeout: timedelta) -> bool:
        """Waits until each step has been drained or has had a try, which does not wait for its time.

        False when the time limit came first. A step whose try failed is tried again later all the same.
        """
        with self._waiting() as waiter:
            return self._await(waiter, timeout)

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
                self._queue.begin_anew()
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
            self._awaited = max(self._awaited, attempts)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._ended >= attempts, timeout.total_seconds()):
                return False
            self._queue.begin_anew()
            return True

    def close(self) -> None:
        """Ends the thread, as soon as no drain is running; what waits is given up. Idempotent."""
        with self._changed:
            if self._closed:
                return
            listens, runs = not self._commits and self._expects_call(), self._running is not None
            first_without = self._ended + runs
            self._stop("the manager ends")
        if listens or (runs and not self._commits):
            with contextlib.suppress(EmergencyCheckpointError):  # Then its part is waited for in vain.
                self._job.board.leave(self._job.generation.number, first_without)
        # The thread of a process that listens does so until the committer closes.
        self._thread.join(0.0 if listens or runs else 5.0)

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
        while (attempt := self._next()) is not None:
            try:
                self._do(attempt)
            except Exception as error:  # Nothing must end the thread: others wait for this process.
                told = PersistentStoreError(f"draining {attempt.step} failed: {type(error).__name__}: {error}")
                self._errors.keep(_caused(told, error))
                with self._changed:
                    self._end(attempt, Verdict("failed", str(told)))
        if self._commits:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        """In the committer: others may wait for the next attempt."""
        for _ in range(_LAST_TRIES):
            with contextlib.suppress(EmergencyCheckpointError):
                self._job.board.end(self._job.generation.number, self._ended)
                return
            time.sleep(_LOOK_SECONDS)

    def _next(self) -> Waiting | None:
        """What the next attempt is for, which counts as running; None when closed."""
        while True:
            try:
                return self._choose() if self._commits else self._listen()
            except Exception as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        """Which step is next cannot be found out now: that is told, and looked at again after a pause."""
        with self._changed:
            if isinstance(error, EmergencyCheckpointError):
                if self._queue:
                    self._errors.keep(error)
                self._queue.give_up("the other processes cannot be reached")
            elif self._lost != (lost := f"{type(error).__name__}: {error}"):
                self._lost = lost
                told = PersistentStoreError(f"which step is drained next cannot be found out: {lost}")
                self._errors.keep(_caused(told, error))
            self._changed.notify_all()
            self._changed.wait_for(lambda: bool(self._closed), _LOOK_SECONDS)

    def _choose(self) -> Waiting | None:
        """In the committer, who says so before the attempt begins."""
        while True:
            with self._changed:
                if self._closed:
                    return None
                pause, ordinal = self._pause(), self._ended
                if pause <= 0:
                    chosen = self._queue.take()
                    self._running, self._since = chosen.step, time.monotonic()
                elif pause == float("inf"):
                    self._changed.wait()
                    continue
                else:
                    chosen = None
                    self._changed.wait(min(pause, _LOOK_SECONDS))
            if chosen is not None:
                return self._call(chosen)
            with contextlib.suppress(EmergencyCheckpointError):
                if self._job.board.is_urged(self._job.generation.number, ordinal):
                    with self._changed:
                        self._not_before = 0.0

    def _call(self, chosen: Waiting) -> Waiting | None:
        """Says to the others what the next attempt is for; None where this process ends before that."""
        board, generation = self._job.board, self._job.generation.number
        try:
            self._insist(chosen.step, lambda: board.call(generation, self._ended, chosen.step))
        except Exception as error:
            with self._changed:
                self._queue.unpin(chosen.slot)
                self._running = None
                self._changed.notify_all()
            if not isinstance(error, EmergencyCheckpointError):
                raise
            return None
        return chosen

    def _insist(self, step: StepId, say: Callable[[], _T]) -> _T:
        """Says something to the others, again and again until it is heard; raises when this process ends first.

        What one process knows of an attempt, and the others do not, would leave them behind for good.
        """
        warned = False
        while True:
            try:
                return say()
            except CoordinationTimeoutError:
                raise
            except EmergencyCheckpointError as error:
                if not warned:
                    self._job.log.warning("drain", step.step, f"the other processes are told again: {error}")
                warned = True
                with self._changed:
                    if self._changed.wait_for(lambda: bool(self._closed), _LOOK_SECONDS):
                        raise

    def _pause(self) -> float:
        """How long no attempt begins, in seconds; 0 where one may. With the lock."""
        over = [self._is_over_for(waiter) for waiter in self._waiters]
        held = any(is_over and waiter.holds for is_over, waiter in zip(over, self._waiters, strict=True))
        if not self._queue or held:
            return float("inf")
        return max(self._not_before - time.monotonic(), 0.0) if all(over) else 0.0

    def _listen(self) -> Waiting | None:
        """In the others, who take part in whatever the committer says that the next attempt is for.

        Where nothing waits here a look now and then is enough: it is an exception that there is something.
        """
        while True:
            with self._changed:
                expects = self._changed.wait_for(self._expects_call, _IDLE_SECONDS)
                if self._closed:
                    return None
                ordinal = self._ended
            called = self._hear(ordinal, expects)
            if called is None:
                continue
            with self._changed:
                if called == OVER and not self._closed:
                    self._stop("process 0 ends its drains")
                if self._closed:
                    return None
                self._running, self._since = called, time.monotonic()
                return self._queue.take_step(called) or Waiting(called, None)

    def _expects_call(self) -> bool:
        return bool(self._closed or self._queue) or self._awaited > self._ended

    def _hear(self, ordinal: int, expects: bool) -> StepId | None:
        """What the attempt with this number is for; None where that has not been said."""
        board, generation = self._job.board, self._job.generation.number
        if not expects:
            return board.called(generation, ordinal)
        with contextlib.suppress(CoordinationTimeoutError):  # The store may fail for long.
            return board.await_call(generation, ordinal, self._call_timeout)
        return None

    @property
    def _call_timeout(self) -> timedelta:
        job = self._job
        return job.timeout + timedelta(seconds=1.5 * job.pauses.longest) + job.margin

    def _do(self, chosen: Waiting) -> None:
        job, started, step = self._job, time.monotonic(), chosen.step
        attempt = Attempt(job.generation, step.step, job.item, self._ended)
        if chosen.slot is None:
            chosen = Waiting(step, self._queue.pin(step))
        try:
            verdict, nbytes = self._drain(attempt, chosen.slot)
        except EmergencyCheckpointError as error:
            verdict, nbytes = self._failed(attempt, error), 0
        except Exception as error:  # The others wait for a verdict, whatever it was.
            told = PersistentStoreError(f"draining {step} failed: {type(error).__name__}: {error}")
            verdict, nbytes = self._failed(attempt, _caused(told, error)), 0
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
            if not verdict.repeats and verdict.cause not in ("unreachable", "throttled"):
                self._abandon_left()  # No commit may follow, and the store answers.
            self._left.append(attempt)  # Others may be at work on it still.
        with self._changed:
            self._end(chosen, verdict)

    def _end(self, chosen: Waiting, verdict: Verdict) -> None:
        """An attempt ended; with the lock."""
        step, self._running = chosen.step, None
        self._ended += 1
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
            self._queue.end_until(step)
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
        if self._commits and (reason := self._who_left(attempt)) is not None:
            raise PersistentStoreError(f"{attempt} has not begun: {reason}")
        if index is None:
            if job.repeats and any(complete > step for complete in job.local.complete_steps()):
                why = f"process {job.process}: its slot was needed, a newer step goes in its place"
                said = Verdict("superseded", why, repeats=True)
                return self._heard(attempt, self._announce(attempt, said)), 0
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
            return self._announce(attempt, Verdict("committed")), nbytes
        return self._await_verdict(attempt), nbytes

    def _given_up(self, attempt: Attempt) -> str | None:
        stands = self._job.board.peek(attempt)
        return stands.reason if stands else self._who_left(attempt)

    def _who_left(self, attempt: Attempt) -> str | None:
        """Which processes take no part in this attempt, nor in a later one; None where all do."""
        left = self._job.board.left(attempt.generation.number)
        gone = sorted(process for process, ordinal in left.items() if ordinal <= attempt.ordinal)
        return f"processes {gone} have closed their managers, and write no part" if gone else None

    def _announce(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        return self._insist(attempt.step_id, lambda: self._job.board.announce(attempt, verdict))

    def _await_verdict(self, attempt: Attempt) -> Verdict:
        """What the committer says of the attempt, which is over for nobody before he has.

        Raises CoordinationTimeoutError where this process ends first, or the committer went on without a word.
        """
        board, warned = self._job.board, False
        limit = (
            self._job.timeout + self._job.margin
        )  # His time limit is the same; a margin lets the end of it be heard.
        while True:
            try:
                return self._heard(attempt, self._insist(attempt.step_id, lambda: board.wait(attempt, limit)))
            except CoordinationTimeoutError as error:
                if self._closed or board.called(attempt.generation.number, attempt.ordinal + 1) is not None:
                    raise
                if not warned:
                    self._job.log.warning("drain", attempt.step, f"the committer is still at it: {error}")
                warned = True

    def _heard(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        """Keeps what others say of a failure for `check_for_errors`."""
        if verdict.result == "failed":
            self._note(attempt.step_id, verdict, PersistentStoreError(f"{attempt} failed: {verdict.reason}"))
        return verdict

    def _failed(self, attempt: Attempt, error: EmergencyCheckpointError) -> Verdict:
        """Tells the others, so that nobody waits, and keeps the error for `check_for_errors`."""
        result: DrainResult = "superseded" if isinstance(error, StaleGenerationError) else "failed"
        said = Verdict(
            result, f"process {self._job.process}: {error}", store_reason(error), self._repeats(attempt, error)
        )
        try:
            # Where the committer has not answered, he may be at work still.
            unanswered = not self._commits and isinstance(error, CoordinationTimeoutError)
            stands = said if unanswered else self._announce(attempt, said)
        except EmergencyCheckpointError as unheard:
            reason = f"{said.reason} (and the others could not be told: {unheard})"
            stands = Verdict(result, reason, said.cause, False)
        if stands.result == "failed":
            self._note(attempt.step_id, stands, error)
        return stands

    def _repeats(self, attempt: Attempt, error: EmergencyCheckpointError) -> bool:
        """Whether another attempt may succeed."""
        if not self._job.repeats or is_final(error):
            return False
        with contextlib.suppress(EmergencyCheckpointError):
            return not self._commits or self._who_left(attempt) is None
        return True

    # After it.

    def _note(self, step: StepId, verdict: Verdict, error: EmergencyCheckpointError) -> None:
        with self._changed:
            asked = any(not waiter.holds for waiter in self._waiters)
        self._errors.failed(step, verdict, error, asked=asked)

    def _tidy(self, step: StepId) -> None:
        """After a commit: older steps, and what failed attempts left. Whatever fails, the commit stands."""
        try:
            self._job.on_commit()
        except (EmergencyCheckpointError, OSError) as error:
            told = PersistentStoreError(f"after the commit of {step}, old steps could not be deleted: {error}")
            self._errors.after_commit("retention", step, told, error)
        self._abandon_left()

    def _abandon_left(self) -> None:
        """Removes what failed attempts left; what cannot be removed now is another time."""
        some, self._left = self._left[:_ABANDONED_AT_ONCE], self._left[_ABANDONED_AT_ONCE:]
        for number, attempt in enumerate(some, 1):
            try:
                self._job.abandon(attempt)
            except (EmergencyCheckpointError, OSError) as error:
                self._left += [*some[number:], attempt]
                said = f"what {attempt} left is removed another time: {error}"
                self._job.log.warning("drain", attempt.step, said)
                return

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


def _caused(told: EmergencyCheckpointError, cause: Exception) -> EmergencyCheckpointError:
    told.__cause__ = cause
    return told
