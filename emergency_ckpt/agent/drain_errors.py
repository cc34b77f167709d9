"""What a trainer is told of its drains: every failure once for each step and cause, and to whoever asks."""

from __future__ import annotations

import threading

from emergency_ckpt.agent.drain import Verdict
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.retrying import StoreReason, store_error
from emergency_ckpt.errors import EmergencyCheckpointError
from emergency_ckpt.telemetry.log import CheckpointLogger


class DrainErrors:
    """Safe to use from any thread."""

    def __init__(self, log: CheckpointLogger) -> None:
        self._log = log
        self._guard = threading.Lock()
        self._errors: list[EmergencyCheckpointError] = []
        self._told: set[tuple[StepId, StoreReason, bool]] = set()

    def take(self) -> list[EmergencyCheckpointError]:
        """Errors since the last call, oldest first."""
        with self._guard:
            errors, self._errors = self._errors, []
        return errors

    def keep(self, error: EmergencyCheckpointError) -> None:
        """Keeps one for `take`."""
        with self._guard:
            self._errors.append(error)

    def failed(self, step: StepId, verdict: Verdict, error: EmergencyCheckpointError, *, asked: bool) -> None:
        """An attempt failed. `asked`: somebody waits in order to hear of it, and is told once more."""
        again = " It is tried again, or a newer step in its place." if verdict.repeats else ""
        text = f"{step} did not reach the persistent tier: {_sentence(error)}{again}"
        told = store_error(verdict.cause, text)
        told.__cause__ = error
        key = (step, verdict.cause, verdict.repeats)
        with self._guard:
            kept = any(str(earlier) == text for earlier in self._errors)
            if key not in self._told or (asked and not kept):
                self._errors.append(told)
            self._told = {known for known in self._told if known[0] == step} | {key}

    def after_commit(
        self, operation: str, step: StepId, told: EmergencyCheckpointError, cause: BaseException
    ) -> None:
        """Something failed after a commit, which stands."""
        told.__cause__ = cause
        self._log.error(operation, step.step, str(told))
        self.keep(told)


def _sentence(error: Exception) -> str:
    text = str(error)
    return text if text.endswith(".") else f"{text}."
