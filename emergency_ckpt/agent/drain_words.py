"""What the drain worker of a process says to those of the others, and waits to hear from them.

What one process knew of an attempt, and the others did not, would leave them behind for good: it is said until
it is heard, or this process ends; and an attempt is over for nobody before the committer's word is known.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from emergency_ckpt.agent.drain import OVER, DrainJob, Verdict
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import CoordinationTimeoutError, EmergencyCheckpointError
from emergency_ckpt.persistent.attempts import Attempt

_PAUSE_SECONDS = 0.5
_LAST_TRIES = 3
_T = TypeVar("_T")


class DrainWords:
    """The board, used so. `closes` waits for so many seconds, and says whether this process ends."""

    def __init__(self, job: DrainJob, closes: Callable[[float], bool]) -> None:
        self._job = job
        self._board = job.board
        self._generation = job.generation.number
        self._closes = closes

    # Which attempt is next.

    def call(self, ordinal: int, step: StepId) -> StepId:
        """In the committer; returns what stands. Raises EmergencyCheckpointError where this process ends."""
        return self._insist(step, lambda: self._board.call(self._generation, ordinal, step))

    def hear(self, ordinal: int, *, expected: bool) -> StepId | None:
        """In the others: what the attempt with this number is for; None where that has not been said.

        It is waited for where it is `expected`.
        """
        if not expected:
            return self._board.called(self._generation, ordinal)
        job = self._job
        limit = job.timeout + timedelta(seconds=1.5 * job.pauses.longest) + job.margin
        with contextlib.suppress(CoordinationTimeoutError):  # The store may fail for long.
            return self._board.await_call(self._generation, ordinal, limit)
        return None

    def is_urged(self, ordinal: int) -> bool:
        """Whether somebody waits for that attempt, as far as it can be found out."""
        with contextlib.suppress(EmergencyCheckpointError):
            return self._board.is_urged(self._generation, ordinal)
        return False

    def end(self, ordinal: int) -> None:
        """In the committer, as its last word: others may wait for the next attempt."""
        for _ in range(_LAST_TRIES):
            with contextlib.suppress(EmergencyCheckpointError):
                self._board.end(self._generation, ordinal)
                return
            time.sleep(_PAUSE_SECONDS)

    def leave(self, ordinal: int) -> None:
        """In another process, as its last word: from this attempt on its part is waited for in vain."""
        with contextlib.suppress(Exception):  # Whatever it is, this process goes on to end.
            if self._board.called(self._generation, ordinal) != OVER:
                self._board.leave(self._generation, ordinal)

    # What became of an attempt.

    def announce(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        """Returns what stands. Raises EmergencyCheckpointError where this process ends first."""
        return self._insist(attempt.step_id, lambda: self._board.announce(attempt, verdict))

    def peek(self, attempt: Attempt) -> Verdict | None:
        """What stands by now. Raises EmergencyCheckpointError where this process ends first."""
        return self._insist(attempt.step_id, lambda: self._board.peek(attempt))

    def await_verdict(self, attempt: Attempt) -> Verdict:
        """What the committer says of an attempt, however long he takes.

        Raises CoordinationTimeoutError where this process ends first, or he went on without a word.
        """
        step, following, warned = attempt.step_id, attempt.ordinal + 1, False
        limit = self._job.timeout + self._job.margin
        while True:
            try:
                return self._insist(step, lambda: self._board.wait(attempt, limit))
            except CoordinationTimeoutError as error:
                is_over = self._closes(0.0) or self._insist(step, lambda: self._is_called(following))
                if (stands := self.peek(attempt)) is not None:
                    return stands  # It came meanwhile.
                if is_over:
                    raise
                if not warned:
                    self._job.log.warning("drain", attempt.step, f"the committer is still at it: {error}")
                warned = True

    def why_given_up(self, attempt: Attempt) -> str | None:
        """Why the committer need not wait for the parts of others any more, as far as that can be found out."""
        with contextlib.suppress(EmergencyCheckpointError):  # It is asked for again.
            stands = self._board.peek(attempt)
            return stands.reason if stands else self._who_left(attempt)
        return None

    def who_left(self, attempt: Attempt) -> str | None:
        """Which processes take no part in this attempt, nor in a later one; None where all do.

        Raises EmergencyCheckpointError where this process ends first.
        """
        return self._insist(attempt.step_id, lambda: self._who_left(attempt))

    def _who_left(self, attempt: Attempt) -> str | None:
        left = self._board.left(self._generation)
        gone = sorted(process for process, ordinal in left.items() if ordinal <= attempt.ordinal)
        return f"processes {gone} have closed their managers, and write no part" if gone else None

    def _is_called(self, ordinal: int) -> bool:
        return self._board.called(self._generation, ordinal) is not None

    def _insist(self, step: StepId, say: Callable[[], _T]) -> _T:
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
                if self._closes(_PAUSE_SECONDS):
                    raise
