"""What one process holds in its slots: table, manifests and files, in agreement with each other.

A manifest that is given up is removed before the table calls its slot empty, and what was a slot's manifest in
memory is what lies in the directory, as far as the directory is still this process's. The caller of anything
here holds `changed`.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.slots import SlotTable
from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.claim import LOCK_WAIT, TAKEOVER_WAIT, Claim, claim_directory
from emergency_ckpt.local.file_system import slow_warning
from emergency_ckpt.local.layout_files import LayoutFiles
from emergency_ckpt.local.manifest import Manifest, write_manifest
from emergency_ckpt.local.recovery import Found, evict, find_slots, make_room, manifest_path
from emergency_ckpt.local.slot_files import SlotFiles
from emergency_ckpt.local.slot_views import SealedSlot


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """How the slots of one process are kept.

    Attributes:
      directory: the ramdisk directory; None keeps the slots in anonymous memory (no local tier).
      ordinal: which of the directories below it this process should take (see `held_positions`).
      max_to_keep: complete steps that stay available locally; 0 without a local tier.
      wanted_slots: slots for full speed; least_slots: without these no step can be kept safely.
      foreign_run: what to do with another run's data in the directory: 'evict' it when its room is needed, or
        raise an 'error' at start.
      lock_wait: how long to wait for another process that has locked the directory with this run's steps.
      takeover_wait: how long to wait for another manager of this process to finish what it has begun.
    """

    directory: Path | None
    max_to_keep: int
    wanted_slots: int
    least_slots: int
    foreign_run: Literal["evict", "error"] = "evict"
    ordinal: int = 0
    lock_wait: timedelta = LOCK_WAIT
    takeover_wait: timedelta = TAKEOVER_WAIT


class HeldSlots:
    """The slots of one process, by index.

    Attributes:
      changed: the lock of everything here, notified at every change.
      claim: the claimed directory; None for anonymous memory.
      numbers: per slot the number in the names of its files.
      manifests: per slot its manifest; None for an empty one, and while it is written.
      foreign: the slots that hold another run's step.
      promises: steps that manifests found at start say were complete.
      table: the slot state machine; changed by `update` only.
      gone: steps that are gone for all but those who work on them.
      doubted: steps that were known to be complete until damage was found in them here.
    """

    def __init__(
        self, options: StoreOptions, run: str, layout: Layout, process: int, log: Callable[[str], None]
    ) -> None:
        """Raises LocalDirectoryError, LocalCapacityError, ForeignRunError."""
        self.log = log
        self.closed = False
        self.claim = _make_claim(options, run, log)
        self.changed = self.claim.changed if self.claim else threading.Condition()
        self.layouts = LayoutFiles(self.directory, layout)
        self.gone: set[StepId] = set()
        self.doubted: set[StepId] = set()
        self._place = layout.hash, process
        slot_bytes = layout.data_bytes(process)
        try:
            found, self.numbers = self._find(options, run, slot_bytes)
            self.manifests: list[Manifest | None] = [found.own.get(n) for n in self.numbers]
            self.foreign = {i: found.foreign[n] for i, n in enumerate(self.numbers) if n in found.foreign}
            self.promises = frozenset(found.promises)
            held = [m.step if m else None for m in self.manifests]
            activations = {a for m in self.manifests if m for a in m.activations}
            self.table = SlotTable.recovered(held, options.max_to_keep, activations, self.foreign)
            self.layouts.write_own(found.foreign_layouts)
            # Last: nothing after it fails, so that no mapping is left behind.
            kept = {i: found.sizes[n] for i, n in enumerate(self.numbers) if n in found.sizes}
            self.files = SlotFiles(self.directory, slot_bytes, self.numbers, kept, self.foreign)
        except BaseException:
            if self.claim:
                self.claim.release()
            raise

    def _find(self, options: StoreOptions, run: str, slot_bytes: int) -> tuple[Found, list[int]]:
        """What is in the directory, and the numbers of the slots to be used."""
        if self.directory is None:
            return Found(), list(range(options.wanted_slots))
        found = find_slots(self.directory, run, self.layouts, options.foreign_run, self.log)
        numbers = make_room(
            self.directory, found, slot_bytes, options.wanted_slots, options.least_slots, self.log
        )
        return found, numbers

    @property
    def directory(self) -> Path | None:
        return self.claim.path if self.claim else None

    @property
    def usable(self) -> bool:
        """Whether these are neither closed nor taken over by a newer manager of the process."""
        return not self.closed and not (self.claim and self.claim.superseded)

    def check_open(self) -> None:
        if self.closed:
            raise LocalDirectoryError(
                f"the store of slots in {self.directory or 'memory'} is closed: its manager was closed; "
                "use a newer one"
            )

    def check_usable(self) -> None:
        self.check_open()
        if self.claim and self.claim.superseded:
            raise LocalDirectoryError(
                f"{self.directory} was taken over by a newer manager of this process; close this one"
            )

    def owns_directory(self) -> bool:
        """Whether what lies in the directory is this process's to change. Raises LocalDirectoryError."""
        return self.claim is not None and self.usable and self.claim.is_current()

    def is_in_place(self, index: int) -> bool:
        """Whether a slot's file lies in a directory that is this process's. Raises LocalDirectoryError."""
        return self.claim is not None and self.claim.is_current() and index not in self.files.lost()

    # What is there.

    def view(self, index: int) -> SealedSlot | None:
        """A sealed slot. Raises CorruptDataError where its layout is not here."""
        manifest = self.manifests[index]
        if manifest is None:
            return None
        return SealedSlot(index, manifest, self.layouts.get(manifest.layout), self.files[index].data)

    def find_all(self, step: StepId) -> tuple[int, ...]:
        """The slots in which `step` is sealed: as this job cuts it first, then those that lack least."""

        def order(index: int) -> tuple[bool, int, int]:
            manifest = self.manifests[index]
            if manifest is None:
                return True, 0, index
            other_cut = (manifest.layout, manifest.position) != self._place
            return other_cut, len(manifest.missing), index

        return tuple(sorted(self.table.find_all(step), key=order))

    def find(self, step: StepId) -> int | None:
        """The first of them, if any."""
        return next(iter(self.find_all(step)), None)

    def standing(self) -> dict[int, str]:
        """Where several slots hold a step that must stay: the one of them that does, and why.

        A whole one in another cut has more of the step than one of the job's own that lacks shards.
        """
        stays = {self._fullest(self.find_all(step)): step for step in self.table.crowded()}
        return {
            index: f"slot {index} holds {step}, and stays of those that do" for index, step in stays.items()
        }

    def _fullest(self, indices: Sequence[int]) -> int:
        """That which lacks least, of equal ones the first."""

        def lacks(index: int) -> int:
            manifest = self.manifests[index]
            return 0 if manifest is None else len(manifest.missing)

        return min(indices, key=lacks)

    def sealed_steps(self, listed_only: bool = True) -> tuple[StepId, ...]:
        """Sealed steps that are neither void nor abandoned, oldest first."""
        listed = {m.step for m in self.manifests if m and (m.listed or not listed_only)} - self.gone
        return tuple(step for step in self.table.sealed_steps() if step in listed)

    # Changes.

    def update(self, table: SlotTable) -> None:
        self.table = table
        if self.claim:
            # Once closed, nobody can seal any more, and a drain verifies what it reads.
            self.claim.count_unsettled(0 if self.closed else table.unsettled())
        else:
            self.changed.notify_all()

    def seal(self, index: int, step: StepId, manifest: Manifest, kept: Collection[int] = ()) -> None:
        """Puts the manifest of a slot that was written in place, and then gives up the slots that it replaces.

        `kept`: slots that hold the same step and are not replaced. Raises LocalDirectoryError.
        """
        table, replaced = self.table.seal(index, kept), self.table.replaced_by(index, kept)
        path = self.manifest_path(index)
        if path:
            if not self.is_in_place(index):
                raise LocalDirectoryError(
                    f"{self.directory} was emptied or replaced while {step} was written there. The "
                    "next save makes it anew; find out what empties it."
                )
            write_manifest(path, manifest)
        self.manifests[index] = manifest
        for other in replaced:
            self.remove_manifest(other)
        self.update(table)

    def doubt(self, step: StepId) -> None:
        """Damage was found in `step` here: that it was complete speaks for overwriting nothing for now."""
        if step in self.table.complete:
            self.doubted.add(step)
            self.update(self.table.forget(step))

    def give_up(self, step: StepId) -> None:
        """Empties the slots of `step`, if it is sealed here and nobody works on them."""
        for index in self.table.find_all(step):
            if not self.table.slots[index].in_use:
                self.give_up_slot(index)

    def give_up_slot(self, index: int) -> None:
        self.remove_manifest(index)
        self.update(self.table.empty(index))

    def left(self, index: int) -> None:
        """Somebody who worked on a sealed slot has left it: what had to wait for that is done by the last."""
        slot = self.table.slots[index]
        if slot.step is None or slot.in_use or not slot.sealed:
            return
        if slot.step in self.gone or slot.step in self.table.abandoned:
            self.gone.discard(slot.step)
            self.give_up_slot(index)

    def empty_for(self, index: int) -> None:
        """Removes the manifest, ours or another run's, and gives the file the size of a slot of this layout."""
        if self.directory and (foreign := self.foreign.get(index)):
            evict(self.directory, self.numbers[index], foreign, self.log)
            del self.foreign[index]
        self.remove_manifest(index)
        self.files.fit(index)

    def remove_manifest(self, index: int) -> None:
        self.unlink_manifest(index)
        self.manifests[index] = None

    def unlink_manifest(self, index: int) -> None:
        """Raises LocalDirectoryError; does nothing where the directory is no longer this process's."""
        path = self.manifest_path(index)
        if path is None or not self.owns_directory():
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise LocalDirectoryError(
                f"cannot remove the manifest {path}: {error.strerror}. Check the owner of the local checkpoint "
                "directory and that it is not mounted read-only."
            ) from error

    def manifest_path(self, index: int) -> Path | None:
        return manifest_path(self.directory, self.numbers[index]) if self.directory else None

    def remove_unfinished(self) -> None:
        """Removes the files of slots that are being written: nobody may find them half written."""
        if not self.owns_directory():
            return
        for index, slot in enumerate(self.table.slots):
            path = self.files.path(index)
            if path is not None and slot.step is not None and not slot.sealed:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    self.log(
                        f"{path} cannot be removed: {error.strerror}; the next start may find it half written"
                    )


def _make_claim(options: StoreOptions, run: str, log: Callable[[str], None]) -> Claim | None:
    if options.directory is None:
        return None
    claim = claim_directory(
        options.directory,
        options.ordinal,
        log,
        run=run,
        lock_wait=options.lock_wait,
        takeover_wait=options.takeover_wait,
    )
    if warning := slow_warning(options.directory):
        log(warning)
    return claim
