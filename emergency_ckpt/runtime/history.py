"""What process 0 tells a policy when it asks about a step: earlier saves, and whether one is in progress."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Any

from emergency_ckpt.core.retention import SavedStep
from emergency_ckpt.core.schedule import NOTHING_DUE, Due
from emergency_ckpt.runtime.catalog import Catalog, utc_time
from emergency_ckpt.runtime.job import Job
from emergency_ckpt.runtime.policies import AskedPolicy, Question
from emergency_ckpt.runtime.retention import Retention

# Each save on its way holds a slot, and there are fewer of those.
_BEGUN_AT_MOST = 64


class History:
    """The saves of both tiers as process 0 knows them. Used by the train loop's thread only."""

    def __init__(
        self, job: Job, catalog: Catalog, retention: Retention, in_progress: Callable[[], Due]
    ) -> None:
        """`in_progress` says for which tiers a save has no end yet."""
        self._job = job
        self._catalog = catalog
        self._retention = retention
        self._in_progress = in_progress
        # Saves that were asked for and are, as far as is known, not yet there.
        self._local_begun: dict[int, SavedStep] = {}
        self._persistent_begun: dict[int, SavedStep] = {}

    def note(self, step: int, due: Due, metrics: Mapping[str, Any]) -> None:
        """A save of `step` was asked for."""
        if not (self._job.leads and self._job.settings.schedule.asks):
            return  # Nobody will ask.
        saved = SavedStep(step, datetime.datetime.now(datetime.UTC), metrics or None)
        for begun, wanted in ((self._local_begun, due.local), (self._persistent_begun, due.persistent)):
            if wanted:
                begun[step] = saved
                for old in list(begun)[:-_BEGUN_AT_MOST]:
                    del begun[old]

    def decide(self, step: int, preempted: bool) -> Due:
        """What the policies that have to be asked say about `step`. Raises what they raise."""
        settings = self._job.settings
        saving = self._in_progress()
        now = datetime.datetime.now(datetime.UTC)

        def ask(
            policy: AskedPolicy, there: Mapping[int, SavedStep], begun: dict[int, SavedStep], busy: bool
        ) -> bool:
            if not busy:
                begun.clear()  # Whatever was begun is there by now, or has failed.
            for old in [number for number in begun if number <= max(there, default=number - 1)]:
                del begun[old]  # Saves end in their order.
            known = {**begun, **there}
            previous = [known[number] for number in sorted(known)]
            return policy(Question(step, now, previous, busy, preempted))

        local = persistent = False
        if settings.asked_locally is not None and settings.schedule.local is not None:
            local = ask(settings.asked_locally, self._on_ramdisk(), self._local_begun, saving.local)
        if settings.asked_persistently is not None and settings.schedule.persistent is not None:
            policy = settings.asked_persistently
            persistent = ask(policy, self._committed(), self._persistent_begun, saving.persistent)
        return Due(local, persistent, "policy") if local or persistent else NOTHING_DUE

    def _on_ramdisk(self) -> dict[int, SavedStep]:
        found: dict[int, SavedStep] = {}
        for step in self._job.local.sealed_steps():
            slot = self._job.local.sealed(step)
            if slot is not None:
                saved = slot.manifest.metadata
                time = utc_time(saved.get("started_nanoseconds") or 0)
                found[step.step] = SavedStep(step.step, time, saved.get("metrics") or None)
        return found

    def _committed(self) -> dict[int, SavedStep]:
        return {info.step: info for info in self._catalog.infos(self._retention.steps())}
