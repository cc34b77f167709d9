"""One attempt at a step, as one process takes part in it: its share, and the verdict that all believe.

Whatever becomes of the share, there is a verdict, and who fails says so, that nobody waits for him.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

from emergency_ckpt.agent.drain import DrainJob, Verdict
from emergency_ckpt.agent.drain_errors import DrainErrors
from emergency_ckpt.agent.drain_words import DrainWords
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
from emergency_ckpt.telemetry.events import DrainResult


@dataclasses.dataclass(frozen=True)
class Manner:
    """How a share is carried out.

    Attributes:
      retry: whether the try before this one failed.
      leaving: processes that write as little as they can, because their hosts go away.
    """

    retry: bool
    leaving: tuple[int, ...]


class Attempts:
    """Carries them out one after the other, in the thread that drains.

    `on_commit` is called in the committer when a step is committed, before the others hear of it; `is_asked`
    says whether somebody waits in order to hear of a failure.
    """

    def __init__(
        self,
        job: DrainJob,
        words: DrainWords,
        errors: DrainErrors,
        on_commit: Callable[[StepId], None],
        is_asked: Callable[[], bool],
    ) -> None:
        self._job = job
        self._words = words
        self._errors = errors
        self._on_commit = on_commit
        self._is_asked = is_asked

    def carry_out(self, attempt: Attempt, slot: int | None, manner: Manner) -> tuple[Verdict, int]:
        """The verdict, and the bytes of this process's part. `slot` is pinned; None where the step is lost."""
        try:
            return self._carry_out(attempt, slot, manner)
        except EmergencyCheckpointError as error:
            return self._failed(attempt, error), 0
        except Exception as error:  # The others wait for a verdict, whatever it was.
            told = PersistentStoreError(f"draining {attempt.step_id} failed: {type(error).__name__}: {error}")
            told.__cause__ = error
            return self._failed(attempt, told), 0

    def _carry_out(self, attempt: Attempt, index: int | None, manner: Manner) -> tuple[Verdict, int]:
        job, words, step = self._job, self._words, attempt.step_id
        if (stands := words.peek(attempt)) is not None:
            return self._heard(attempt, stands), 0  # This process comes late.
        if job.commits and (reason := words.who_left(attempt)) is not None:
            raise PersistentStoreError(f"{attempt} has not begun: {reason}")
        if index is None:
            if job.repeats and any(complete > step for complete in job.local.complete_steps()):
                why = f"process {job.process}: its slot was needed, a newer step goes in its place"
                said = Verdict("superseded", why, repeats=True)
                return self._heard(attempt, words.announce(attempt, said)), 0
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
            commits=job.commits,
            retry=manner.retry,
            leaving=manner.leaving,
        )
        if not share.commits:  # Only the committer waits for others, and so for their failures.
            nbytes = job.runner.run(share, slot, lambda: None)
            return self._heard(attempt, words.await_verdict(attempt)), nbytes
        nbytes = job.runner.run(share, slot, lambda: words.why_given_up(attempt))
        self._on_commit(step)
        return words.announce(attempt, Verdict("committed")), nbytes

    def _heard(self, attempt: Attempt, verdict: Verdict) -> Verdict:
        """Keeps what others say of a failure for `check_for_errors`."""
        if verdict.result == "failed":
            self._note(attempt, verdict, PersistentStoreError(f"{attempt} failed: {verdict.reason}"))
        return verdict

    def _failed(self, attempt: Attempt, error: EmergencyCheckpointError) -> Verdict:
        """Tells the others, so that nobody waits, and keeps the error for `check_for_errors`."""
        result: DrainResult = "superseded" if isinstance(error, StaleGenerationError) else "failed"
        reason, repeats = f"process {self._job.process}: {error}", self._repeats(attempt, error)
        said = Verdict(result, reason, store_reason(error), repeats)
        try:
            # Where the committer has not answered, he may be at work still.
            unanswered = not self._job.commits and isinstance(error, CoordinationTimeoutError)
            stands = said if unanswered else self._words.announce(attempt, said)
        except EmergencyCheckpointError as unheard:
            reason = f"{said.reason} (and the others could not be told: {unheard})"
            stands = Verdict(result, reason, said.cause, False)
        if stands.result == "failed":
            self._note(attempt, stands, error)
        return stands

    def _repeats(self, attempt: Attempt, error: EmergencyCheckpointError) -> bool:
        """Whether another attempt may succeed."""
        if not self._job.repeats or is_final(error):
            return False
        with contextlib.suppress(EmergencyCheckpointError):
            return not self._job.commits or self._words.who_left(attempt) is None
        return True

    def _note(self, attempt: Attempt, verdict: Verdict, error: EmergencyCheckpointError) -> None:
        self._errors.failed(attempt.step_id, verdict, error, asked=self._is_asked())
