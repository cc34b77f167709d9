"""How each process of a restore gets its extras: from its ramdisk, from whoever kept them, or with the arrays.

Extras belong to one process of a job of one size; where another number of processes saved them, each makes its
own of what was declared, and those that keep them get them at once, as at a save. Items may be written by one
process for all, by convention process 0, so that its items are sent to the others where items are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from emergency_ckpt.core.extras import Item, ProcessExtras, joined_items
from emergency_ckpt.core.placement import extras_keepers
from emergency_ckpt.core.restore_plan import CommonPlan
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.persistent.files import LocalFiles
from emergency_ckpt.persistent.reader import StepReader
from emergency_ckpt.runtime.extras import SavedExtras, WantedExtras, convert
from emergency_ckpt.runtime.items import StoredItem
from emergency_ckpt.runtime.job import Job


class ExtrasExchange:
    """The extras of one process in one round of a restore."""

    def __init__(self, job: Job, plan: CommonPlan, wanted: WantedExtras) -> None:
        """`wanted`: the same on all processes."""
        self._job = job
        self._plan = plan
        self._wanted = wanted
        self._items = wanted.items
        self._text: str | None = None
        self._is_converted = False
        self._lacks_some = False
        self._of_others: dict[int, str] = {}
        self._why_none = f"{plan.step} was saved without any"

    @property
    def own(self) -> dict[int, str]:
        """This process's extras as a manifest keeps them, and new ones that it keeps for others.

        Nothing where some that are wanted could not be made: what they are to be made of must not be hidden.
        """
        if self._text is None or self._lacks_some:
            return {}
        return {self._job.process: self._text, **self._of_others}

    def give(self, key: str) -> None:
        """Sends the extras that this process keeps for those that lost theirs."""
        job, step = self._job, self._plan.step
        for ward in self._plan.wards(job.process):
            text = self._kept_here(ward, job.topology.process_count)
            if text is None:
                raise CorruptDataError(
                    f"process {job.process} no longer has the extras of process {ward} for {step}"
                )
            job.coordinator.put(f"{key}/extras/{ward}", text.encode())
        asked = [owner for owner in self._asked_owners if self._plan.extras_kept[owner] == job.process]
        for owner in asked:
            text = self._kept_here(owner, len(self._plan.extras_kept))
            job.coordinator.put(f"{key}/kept/{owner}", (text or "").encode())

    def _kept_here(self, owner: int, saved_by: int) -> str | None:
        """The extras of a process of a job of this size, in the slots of this one."""
        for slot in self._job.local.sealed_slots(self._plan.step):
            if slot.layout.process_count == saved_by and owner in slot.manifest.extras:
                return slot.manifest.extras[owner]
        return None

    def collect(self, key: str) -> None:
        """This process's extras from whoever keeps them; after a renumbering that may be another process."""
        job = self._job
        if self._plan.extras_kept:
            self._collect_kept(key)
            return
        keeper = self._plan.extras_from[job.process]
        if keeper is None:
            return
        if keeper != job.process:
            found = job.coordinator.get(f"{key}/extras/{job.process}", job.settings.coordination_timeout)
            self._text = found.decode()
            return
        self._text = self._kept_here(job.process, job.topology.process_count)

    def take_persistent(self, reader: StepReader) -> None:
        """Takes those of this process from the persistent step, or what can be made of those that are there."""
        if self._plan.extras_kept:
            return  # They came from ramdisks.
        saved = reader.extras
        if len(saved) == self._job.topology.process_count:
            text = saved.get(str(self._job.process))
            if text is None:
                raise CorruptDataError(f"{reader.path} holds extras of the processes {sorted(saved)}")
            self._text = text.decode(errors="replace")
        elif saved:
            self._why_none = self._of_another_job(len(saved))
            self._convert(_parsed(saved), len(saved))

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
        converted = self._is_converted
        if not self._items:
            return SavedExtras(own, self._why_none, is_converted=converted)
        found = self._job.coordinator.get(f"{key}/items", self._job.settings.coordination_timeout).decode()
        parts = [part for part in (own, ProcessExtras.from_text(found) if found else None) if part]
        items = joined_items(parts) or self._persistent_items()
        return SavedExtras(own, self._why_none, items, converted)

    def _persistent_items(self) -> Mapping[str, Item | epath.Path | StoredItem]:
        """Items of a step of another job size, or of another program."""
        if all(held.step_id != self._plan.step for held in self._job.persistent.steps()):
            return {}
        reader = self._job.open_persistent(self._plan.step)
        if reader.verified:
            saved = sorted(reader.extras.items(), key=lambda part: int(part[0]))
            return joined_items(ProcessExtras.from_text(data.decode()) for _, data in saved)
        step = reader.files
        if not isinstance(step, LocalFiles):
            there = {entry.name for entry in step.entries() if entry.is_directory}
            return {name: StoredItem(step.below(name)) for name in self._items if name in there}
        return {name: path for name in self._items if (path := epath.Path(reader.path) / name).is_dir()}

    @property
    def _asked_owners(self) -> list[int]:
        """The processes of a job of another size whose extras are sent: all, or one where that is enough."""
        kept = [owner for owner, keeper in enumerate(self._plan.extras_kept) if keeper is not None]
        return kept if self._wanted.reshards else kept[:1]

    def _collect_kept(self, key: str) -> None:
        """Makes this process's extras of those of a job of another size, and tells those who keep them."""
        job, plan = self._job, self._plan
        saved_by, timeout = len(plan.extras_kept), job.settings.coordination_timeout
        self._why_none = self._of_another_job(saved_by)
        found = {
            str(owner): data
            for owner in self._asked_owners
            if (data := job.coordinator.get(f"{key}/kept/{owner}", timeout))
        }
        if self._wanted.reshards and len(found) < saved_by:
            found = {**self._persistent_extras(saved_by), **found}
        keepers = extras_keepers(job.topology.process_slice)
        try:
            self._convert(_parsed(found), saved_by)
        finally:  # Nobody waits for a process that could not make its own.
            if keepers[job.process]:
                made = self.own.get(job.process, "")
                job.coordinator.put(f"{key}/converted/{job.process}", made.encode())
        for ward, by in enumerate(keepers):
            if job.process in by and (data := job.coordinator.get(f"{key}/converted/{ward}", timeout)):
                self._of_others[ward] = data.decode()

    def _convert(self, saved: Mapping[int, ProcessExtras], saved_by: int) -> None:
        job = self._job
        count = job.topology.process_count
        made = convert(self._wanted.targets, saved, saved_by, job.process, count)
        self._is_converted = True
        self._text = made.to_text() if made else None
        self._lacks_some = made is None or not self._wanted.needed <= made.values.keys()

    def _persistent_extras(self, saved_by: int) -> Mapping[str, bytes]:
        """Those of the same step in the persistent tier, if it is there and so many processes saved it."""
        if all(held.step_id != self._plan.step for held in self._job.persistent.steps()):
            return {}
        saved = self._job.open_persistent(self._plan.step).extras
        return saved if len(saved) == saved_by else {}

    def _of_another_job(self, processes: int) -> str:
        return (
            f"{self._plan.step} was saved by {processes} processes and this job has "
            f"{self._job.topology.process_count}, so that no process can tell which of them are its own: save "
            "them as GlobalExtras where they are the same on all processes, or restore them as ReshardedExtras"
        )


def _parsed(saved: Mapping[str, bytes]) -> dict[int, ProcessExtras]:
    return {int(p): ProcessExtras.from_text(text.decode(errors="replace")) for p, text in saved.items()}
