"""How each process of a restore gets its extras: from its ramdisk, from whoever kept them, or with the arrays.

Extras belong to one process of a job of one size. Items may be written by one process for all, by convention
process 0, so that its items are sent to the others where items are wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from etils import epath

from emergency_ckpt.core.extras import Item, ProcessExtras, joined_items
from emergency_ckpt.core.restore_plan import RestorePlan
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.runtime.extras import SavedExtras
from emergency_ckpt.runtime.job import Job


class ExtrasExchange:
    """The extras of one process in one round of a restore."""

    def __init__(self, job: Job, plan: RestorePlan, items: Collection[str]) -> None:
        """`items`: the names of those that are wanted; the same on all processes."""
        self._job = job
        self._plan = plan
        self._items = items
        self._text: str | None = None
        self._why_none = f"{plan.step} was saved without any"

    @property
    def own(self) -> dict[int, str]:
        """This process's extras as a manifest keeps them; empty where there are none."""
        return {} if self._text is None else {self._job.process: self._text}

    def give(self, key: str) -> None:
        """Sends the extras that this process keeps for those that lost theirs."""
        job, step = self._job, self._plan.step
        wards = [p for p, keeper in enumerate(self._plan.extras_from) if keeper == job.process and p != keeper]
        slot = job.local.sealed(step) if wards else None
        for ward in wards:
            text = slot.manifest.extras.get(ward) if slot else None
            if text is None:
                raise CorruptDataError(
                    f"process {job.process} no longer has the extras of process {ward} for {step}"
                )
            job.coordinator.put(f"{key}/extras/{ward}", text.encode())

    def collect(self, key: str) -> None:
        """This process's extras from whoever keeps them; after a renumbering that may be another process."""
        job = self._job
        keeper = self._plan.extras_from[job.process]
        if keeper is None:
            return
        if keeper != job.process:
            found = job.coordinator.get(f"{key}/extras/{job.process}", job.settings.coordination_timeout)
            self._text = found.decode()
            return
        slot = job.local.sealed(self._plan.step)
        self._text = slot.manifest.extras.get(job.process) if slot else None

    def take_persistent(self, reader: StepReader) -> None:
        """Takes those of this process from the persistent step, if a job of this size saved it."""
        saved = reader.extras
        if len(saved) == self._job.topology.process_count:
            text = saved.get(str(self._job.process))
            if text is None:
                raise CorruptDataError(f"{reader.path} holds extras of the processes {sorted(saved)}")
            self._text = text.decode(errors="replace")
        elif saved:
            self._why_none = self._of_another_job(len(saved))

    def note_saved_by(self, manifest: Manifest) -> None:
        """Remembers why there may be none: the slot was sealed by a job of another size."""
        if manifest.extras and manifest.process_count != self._job.topology.process_count:
            self._why_none = self._of_another_job(manifest.process_count)

    def give_items(self, key: str) -> None:
        """Process 0 sends its items to those that wait for them in `saved`."""
        if self._items and self._job.leads:
            self._job.coordinator.put(f"{key}/items", (self._text or "").encode())

    def saved(self, key: str) -> SavedExtras:
        """What there is beside the arrays, in the memory of this process or in the persistent step."""
        own = ProcessExtras.from_text(self._text) if self._text is not None else None
        if not self._items:
            return SavedExtras(own, self._why_none)
        found = self._job.coordinator.get(f"{key}/items", self._job.settings.coordination_timeout).decode()
        parts = [part for part in (own, ProcessExtras.from_text(found) if found else None) if part]
        return SavedExtras(own, self._why_none, joined_items(parts) or self._persistent_items())

    def _persistent_items(self) -> Mapping[str, Item | epath.Path]:
        """Items of a step of another job size, or of another program."""
        if all(held.step_id != self._plan.step for held in self._job.persistent.steps()):
            return {}
        reader = self._job.open_persistent(self._plan.step)
        if reader.verified:
            saved = sorted(reader.extras.items(), key=lambda part: int(part[0]))
            return joined_items(ProcessExtras.from_text(data.decode()) for _, data in saved)
        return {name: path for name in self._items if (path := epath.Path(reader.path) / name).is_dir()}

    def _of_another_job(self, processes: int) -> str:
        return (
            f"{self._plan.step} was saved by {processes} processes and this job has "
            f"{self._job.topology.process_count}, so that no process can tell which of them are its own"
        )
