"""Retention: which committed steps are deleted after a commit. The committer alone does it, in the background.

A policy that fails deletes nothing and is heard: its error reaches the log and `check_for_errors`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from emergency_ckpt.core.retention import given_up_steps, superseded_steps
from emergency_ckpt.errors import PersistentStoreError
from emergency_ckpt.persistent.attempts import PersistentStep
from emergency_ckpt.persistent.store import without_void
from emergency_ckpt.runtime.catalog import Catalog
from emergency_ckpt.runtime.job import Job


class Retention:
    """Deletes persistent steps that the settings give up, and void ones. For one generation. Thread-safe."""

    def __init__(self, job: Job, catalog: Catalog) -> None:
        self._job = job
        self._catalog = catalog
        self._lock = threading.Lock()
        self._kept: tuple[PersistentStep, ...] | None = None

    def apply(self) -> None:
        """Chooses what is to be deleted now, which is done in the background.

        Raises PersistentStoreError where nothing can be chosen; what is left stays restorable.
        """
        job = self._job
        steps = job.persistent.steps()
        valid = without_void(steps, job.local.activations)
        self._know(valid)
        given_up = self._given_up(valid)
        kept = [step for step in valid if step.step_id.step not in given_up]
        self._know(kept)
        gone = [
            (step, "a restore left it behind" if step not in valid else "newer ones are kept")
            for step in steps
            if step not in kept
        ]
        job.deletions.delete(gone, max(kept, key=lambda step: step.step_id, default=None))

    def steps(self) -> tuple[PersistentStep, ...]:
        """Committed steps that are not void, without asking the store at every call."""
        if (kept := self._kept) is not None:
            return kept
        listed = tuple(self._catalog.persistent())
        with self._lock:
            if self._kept is None:  # Otherwise there was a commit meanwhile, which knows better.
                self._kept = listed
            return self._kept

    def forget_steps(self) -> None:
        """Steps were deleted or added elsewhere."""
        with self._lock:
            self._kept = None

    def _know(self, steps: Sequence[PersistentStep]) -> None:
        with self._lock:
            self._kept = tuple(steps)

    def _given_up(self, valid: Sequence[PersistentStep]) -> set[int]:
        """Numbers of the steps that go. The newest one stays, be it by generation or by number."""
        settings = self._job.settings
        if settings.preservation is not None:
            numbers = self._ask(valid)
        else:
            numbers = superseded_steps(
                [step.step_id.step for step in valid],
                settings.persistent_max_to_keep,
                settings.persistent_keep_period,
            )
        newest = max((step.step_id for step in valid), default=None)
        return {number for number in numbers if newest is None or number != newest.step}

    def _ask(self, valid: Sequence[PersistentStep]) -> list[int]:
        assert self._job.settings.preservation is not None
        infos = self._catalog.infos(valid)
        try:
            answers = self._job.settings.preservation(infos)
            return given_up_steps([info.step for info in infos], answers)
        except Exception as error:  # The policy is the user's: whatever it raises is told to the user.
            raise PersistentStoreError(
                f"the preservation policy of the persistent tier failed on the steps "
                f"{[info.step for info in infos]}: {type(error).__name__}: {error}. No step is deleted while "
                "it fails; correct the policy"
            ) from error
