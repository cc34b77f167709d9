"""Whose turn it is: the committer chooses which step each attempt is for, and the others listen.

Every process takes part in every attempt, whether it was told of that step or not, so that all count alike.
"""

from __future__ import annotations

import abc

from emergency_ckpt.agent.drain import OVER
from emergency_ckpt.agent.drain_errors import DrainErrors
from emergency_ckpt.agent.drain_queue import Waiting
from emergency_ckpt.agent.drain_schedule import DrainSchedule
from emergency_ckpt.agent.drain_words import DrainWords
from emergency_ckpt.errors import EmergencyCheckpointError, PersistentStoreError

_LOOK_SECONDS = 0.5
_IDLE_SECONDS = 5.0


class Turns(abc.ABC):
    """For the thread that drains."""

    def __init__(self, schedule: DrainSchedule, words: DrainWords, errors: DrainErrors) -> None:
        self._schedule = schedule
        self._words = words
        self._errors = errors
        self._changed = schedule.changed
        self._told = ""

    def next(self) -> Waiting | None:
        """What the next attempt is for, which counts as running; None when closed."""
        while True:
            try:
                return self._next()
            except Exception as error:  # Nothing must end the thread: others wait for this process.
                self._tell(error)
                self._schedule.wait_closed(_LOOK_SECONDS)

    @abc.abstractmethod
    def _next(self) -> Waiting | None: ...

    def _tell(self, error: Exception) -> None:
        """Which step is next cannot be found out now. It is looked at again."""
        with self._changed:
            if isinstance(error, EmergencyCheckpointError):
                if self._schedule.queue:
                    self._errors.keep(error)
                self._schedule.give_up("the other processes cannot be reached", None)
            elif self._told != (what := f"{type(error).__name__}: {error}"):
                self._told = what
                told = PersistentStoreError(f"which step is drained next cannot be found out: {what}")
                told.__cause__ = error
                self._errors.keep(told)


class Choosing(Turns):
    """In the committer, who says so before an attempt begins."""

    def _next(self) -> Waiting | None:
        schedule = self._schedule
        while True:
            with self._changed:
                if schedule.closed:
                    return None
                pause, ordinal = schedule.pause(), schedule.ended
                if pause <= 0:
                    chosen = schedule.take()
                    break
                if pause == float("inf"):
                    self._changed.wait()
                    continue
                self._changed.wait(min(pause, _LOOK_SECONDS))
            if self._words.is_urged(ordinal):
                schedule.end_pause()
        try:
            called = self._words.call(ordinal, chosen.step)
        except Exception as error:
            schedule.put_back(chosen)
            if isinstance(error, EmergencyCheckpointError):
                return None  # This process ends.
            raise
        if called == chosen.step:
            return chosen
        # The others heard of that one, by a call that seemed to have failed.
        schedule.put_back(chosen)
        with self._changed:
            return schedule.take_step(called)


class Listening(Turns):
    """In the others. Where nothing is expected, a look now and then is enough."""

    def _next(self) -> Waiting | None:
        schedule = self._schedule
        while True:
            with self._changed:
                self._changed.wait_for(lambda: schedule.closed or schedule.expects, _IDLE_SECONDS)
                if schedule.closed:
                    return None
                ordinal, expected = schedule.ended, schedule.expects
            called = self._words.hear(ordinal, expected=expected)
            if called is None:
                continue
            with self._changed:
                if called == OVER and not schedule.closed:
                    schedule.stop("process 0 ends its drains")
                return None if schedule.closed else schedule.take_step(called)
