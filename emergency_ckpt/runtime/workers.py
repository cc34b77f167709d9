"""What works in the background for one generation: saves, drains, retention, and the decisions about saves.

A restore in the middle of a run ends one set of workers and starts another; nothing of one generation reaches
the next.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from emergency_ckpt.agent.drain_worker import DrainWorker
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.schedule import Due
from emergency_ckpt.errors import CoordinationTimeoutError, EmergencyCheckpointError
from emergency_ckpt.jaxio.binding import StateBinder
from emergency_ckpt.runtime.backups import Backups
from emergency_ckpt.runtime.catalog import Catalog
from emergency_ckpt.runtime.decisions import ToldDecisions
from emergency_ckpt.runtime.history import History
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.retention import Retention
from emergency_ckpt.runtime.saving import SavePipeline
from emergency_ckpt.runtime.settings import Settings
from emergency_ckpt.runtime.start import start_drains

Interrupted = Callable[[], bool] | None
"""Asked now and then by whoever waits: true, nobody waits any longer. None: nothing interrupts."""


class Workers:
    """The workers of the current generation of one process."""

    def __init__(self, job: Job, catalog: Catalog, binder: StateBinder, promised: StepId | None) -> None:
        """`promised`: the newest step that is restorable now."""
        self._settings = job.settings
        self.retention = Retention(job, catalog)
        self.drain = start_drains(job, self.retention)
        self.backups = self._start_backups(job)
        self.pipeline = SavePipeline(job, binder, self.drain, promised, self.backups)
        self.history = History(job, catalog, self.retention, self._in_progress)
        self.decisions = ToldDecisions(
            job.coordinator, job.generation.number, job.settings.coordination_timeout
        )

    def _start_backups(self, job: Job) -> Backups | None:
        rule = job.settings.backups
        if rule is None or self.drain is None:
            return None

        def tell(step: int, why: str) -> None:
            job.log.info("backup", step, f"goes to the persistent tier from the ramdisks: {why}")

        return Backups(rule, job.coordinator, self.drain, tell, job.settings.clock)

    @property
    def patience(self) -> timedelta:
        """How long `wait` may take."""
        return _save_patience(self._settings) + _drain_patience(self._settings)

    def wait(self, interrupted: Interrupted = None) -> bool:
        """Waits until every save has its outcome and every drain has had a try, within their time limits.

        False where it was interrupted before.
        """
        return self.wait_for_saves(interrupted) and self.wait_for_drains(interrupted)

    def wait_for_drains(self, interrupted: Interrupted = None) -> bool:
        """Waits until every step has been drained, or has had a try; False where it was interrupted before."""
        limit = _drain_patience(self._settings)
        if self.drain is None or self.drain.wait(limit, interrupted):
            return True
        if interrupted is not None and interrupted():
            return False
        raise self._still_running(self.drain, limit)

    def hold_drains(self) -> int:
        """As `wait_for_drains`, in process 0; no drain begins afterwards, until `release_drains`.

        Returns how many there were.
        """
        limit = _drain_patience(self._settings)
        if self.drain is None:
            return 0
        if (ended := self.drain.hold(limit)) is None:
            raise self._still_running(self.drain, limit)
        return ended

    def await_held_drains(self, attempts: int) -> None:
        """The part of the other processes: `attempts` is what `hold_drains` returned in process 0."""
        limit = _drain_patience(self._settings)
        if self.drain is not None and not self.drain.wait_for(attempts, limit):
            raise self._still_running(self.drain, limit)

    def release_drains(self) -> None:
        """What is to be tried again is."""
        if self.drain is not None:
            self.drain.release()

    def give_up_drains(self, reason: str, step: int | None = None) -> None:
        """What waits to be drained, or one step of it, is not drained any more."""
        if self.drain is not None:
            self.drain.give_up(reason, step)

    def _still_running(self, drain: DrainWorker, limit: timedelta) -> CoordinationTimeoutError:
        return CoordinationTimeoutError(
            f"drains were still running after {limit.total_seconds():.0f} s: {drain.describe()}. It goes on by "
            "itself; look at the logs of the other processes, or raise checkpoint_drain_timeout_seconds"
        )

    def wait_for_saves(self, interrupted: Interrupted = None) -> bool:
        """Waits until every save has its outcome; False where it was interrupted before."""
        limit = _save_patience(self._settings)
        if self.pipeline.wait(limit, interrupted):
            return True
        if interrupted is not None and interrupted():
            return False
        raise CoordinationTimeoutError(f"saves were still running after {limit.total_seconds():.0f} s")

    def take_errors(self) -> list[EmergencyCheckpointError]:
        """Errors since the last call, oldest first of each worker."""
        return [*self.pipeline.take_errors(), *(self.drain.take_errors() if self.drain is not None else ())]

    def close(self) -> None:
        """Ends the threads; what is not done by now is left undone."""
        self.pipeline.close(timedelta(0))
        if self.drain is not None:
            self.drain.close()

    def _in_progress(self) -> Due:
        """The tiers for which a save has no end yet."""
        saving = self.pipeline.in_progress()
        # A drain begins before the save that it belongs to ends: asked in this order, none is overlooked.
        draining = self.drain is not None and self.drain.busy
        return Due(saving.local, saving.persistent or draining, "in progress")


# Each save and each drain has a limit of its own; several may be queued.


def _save_patience(settings: Settings) -> timedelta:
    return 4 * settings.coordination_timeout


def _drain_patience(settings: Settings) -> timedelta:
    return 2 * settings.drain_timeout + timedelta(seconds=60)
