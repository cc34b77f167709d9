"""What of this run is committed, as process 0 finds it in the store and tells the others.

The store is asked once for all processes: two that look for themselves may see different things.
"""

from __future__ import annotations

import time

from emergency_ckpt.agent.drain_worker import DrainWorker
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.errors import EmergencyCheckpointError, PersistentStoreError
from emergency_ckpt.runtime.calls import Calls
from emergency_ckpt.runtime.catalog import Catalog
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.retention import Retention


class Persisted:
    """Questions about the persistent tier. All processes ask the same, unless something else is said."""

    def __init__(self, job: Job, catalog: Catalog, calls: Calls) -> None:
        self._job = job
        self._catalog = catalog
        self._calls = calls
        # Who asks may have to wait for process 0, which waits for the store.
        self._limit = job.settings.coordination_timeout + job.settings.drain_timeout

    def has(self, step: int, key: str) -> bool:
        """Whether `step` is committed. Raises PersistentStoreError on process 0, PeerFailedError elsewhere."""
        return self._calls.tell(f"{key}/persistent", lambda: self._lists(step))

    def has_for_sure(self, step: int, key: str, drain: DrainWorker | None) -> bool:
        """The same, False where the store does not say so; what `drain` has committed it need not say."""

        def find() -> bool:
            newest = drain.newest_committed if drain is not None else None
            if newest is not None and newest.step == step:
                return True
            try:
                return self._lists(step)
            except PersistentStoreError as error:
                self._job.log.warning("save", step, f"whether it is persistent cannot be found out: {error}")
                return False

        return self._calls.tell(f"{key}/committed", find, self._limit)

    def numbers(self, retention: Retention) -> list[int]:
        """Numbers of the committed steps; empty where process 0 cannot know."""

        def find() -> list[int]:
            try:
                return [held.step_id.step for held in retention.steps()]
            except PersistentStoreError as error:
                self._job.log.warning("retention", None, f"datasets that may go stay for now: {error}")
                return []

        return self._calls.tell_often("committed", find)

    def age_of(self, step: StepId) -> float:
        """Seconds since a step was committed; 0 where nobody can tell. Of one process."""
        try:
            committed = self._catalog.facts(step.step).committed_nanoseconds
        except (EmergencyCheckpointError, OSError) as error:
            self._job.log.warning("backup", step.step, f"when it was committed is not known: {error}")
            return 0.0
        return 0.0 if committed is None else max(time.time() - committed / 1e9, 0.0)

    def _lists(self, step: int) -> bool:
        return any(held.step_id.step == step for held in self._catalog.persistent())
