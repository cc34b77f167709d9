"""What follows an attempt: retention and the user's callback after a commit, and what failed attempts left.

Whatever fails of it, a commit stands; what could not be removed is removed another time.
"""

from __future__ import annotations

from emergency_ckpt.agent.drain import DrainJob, Verdict
from emergency_ckpt.agent.drain_errors import DrainErrors
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import EmergencyCheckpointError, PersistentStoreError
from emergency_ckpt.persistent.attempts import Attempt

_ABANDONED_AT_ONCE = 64


class Aftermath:
    """For the thread that drains."""

    def __init__(self, job: DrainJob, errors: DrainErrors) -> None:
        self._job = job
        self._errors = errors
        self._left: list[Attempt] = []  # that failed, and may have left something

    def tidy(self, step: StepId) -> None:
        """In the committer, after a commit: older steps go, and what failed attempts left."""
        try:
            self._job.on_commit()
        except Exception as error:  # Whatever it is, the others are to hear of the commit.
            told = PersistentStoreError(f"after the commit of {step}, old steps could not be deleted: {error}")
            self._errors.after_commit("retention", step, told, error)
        self._abandon_left()

    def note_failed(self, attempt: Attempt, verdict: Verdict) -> None:
        """In the committer, after any other end."""
        if not verdict.repeats and verdict.cause not in ("unreachable", "throttled"):
            self._abandon_left()  # No commit may follow, and the store answers.
        self._left.append(attempt)  # Others may be at work on it still.

    def call_back(self, step: StepId) -> None:
        """The user's callback after a commit."""
        if self._job.after_commit is None:
            return
        try:
            self._job.after_commit()
        except (Exception, SystemExit) as error:  # The thread goes on, whatever the user's raises.
            told = EmergencyCheckpointError(
                f"{step} was committed, but the callback after it failed: {type(error).__name__}: {error}"
            )
            self._errors.after_commit("drain", step, told, error)

    def _abandon_left(self) -> None:
        some, self._left = self._left[:_ABANDONED_AT_ONCE], self._left[_ABANDONED_AT_ONCE:]
        for number, attempt in enumerate(some, 1):
            try:
                self._job.abandon(attempt)
            except Exception as error:
                self._left += [*some[number:], attempt]
                said = f"what {attempt} left is removed another time: {error}"
                self._job.log.warning("drain", attempt.step, said)
                return
